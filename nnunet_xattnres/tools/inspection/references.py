"""References of the cases: label maps with which predictions are compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_xattnres.common.device import is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.nnunet.datasets import labels_or_regions, unknown_values
from nnunet_xattnres.nnunet.folders import hint_if_unset
from nnunet_xattnres.tools.inspection.regions import LabelMap, Volume
from nnunet_xattnres.tools.inspection.trained_model import Model

REMEDY = "--labels takes the references of these images"


class References:
    """The references of all cases in a folder, CASE.nii.gz or with another ending of the dataset.

    files: by case. labels: the values of every label or region of the model.

    Raises `XAttnResError` for a missing reference.
    """

    def __init__(self, model: Model, folder: Path, cases: Sequence[str]) -> None:
        self.model = model
        self.files = {case: folder / f"{case}{model.dataset_json['file_ending']}" for case in cases}
        self.labels = labels_or_regions(model.dataset_json["labels"])
        missing = [file for file in self.files.values() if not file.is_file()]
        if missing:
            raise XAttnResError(
                f"{missing[0]} does not exist ({len(missing)} of {counted(len(cases), 'reference')} missing): "
                f"--labels takes a folder with one for every case, or leave it out{hint_if_unset('nnUNet_raw', folder)}"
            )

    def check(self, cases: Mapping[str, Sequence[str]]) -> None:
        """Raise `XAttnResError` for a reference that `read` would refuse, before hours of predictions.

        cases: the files of every case, one per channel.
        """
        for case, files in cases.items():
            self.read(case, *self.model.read(files))

    def read(self, case: str, image: Volume, properties: Mapping[str, Any]) -> LabelMap:
        """The reference of a case [z, y, x]. image, properties: from `Model.read`.

        Raises `XAttnResError` if it cannot be read, does not fit the image, or holds values that the model's
        dataset.json does not name.
        """
        path = self.files[case]
        try:
            (reference,), read = self.model.reader.read_seg(str(path))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise XAttnResError(f"cannot read {path} ({one_line(str(error))}): get the file again") from None
        if reference.shape != image.shape[1:]:
            raise XAttnResError(f"{path} has the shape {reference.shape}, its image {image.shape[1:]}: {REMEDY}")
        if not np.allclose(read["spacing"], properties["spacing"], rtol=1e-3):
            raise XAttnResError(
                f"{path} has the spacing {tuple(read['spacing'])}, its image {tuple(properties['spacing'])}: {REMEDY}"
            )
        if unknown := unknown_values(reference, self.labels, self.model.label_manager.ignore_label):
            raise XAttnResError(f"{path} holds the values {unknown}, which are no labels of the model: {REMEDY}")
        return reference
