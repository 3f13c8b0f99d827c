"""What `inspect` writes for one case."""

import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from tqdm import tqdm

from nnunet_xattnres.common.errors import one_line
from nnunet_xattnres.routing.drawing import CasePicture, draw_case, save_figure
from nnunet_xattnres.routing.recording import CAVEAT, DECIMALS
from nnunet_xattnres.tools.inspection.knock_out import KnockOut
from nnunet_xattnres.tools.inspection.nifti import as_nifti
from nnunet_xattnres.tools.inspection.regions import LabelMap, Regions, Volume
from nnunet_xattnres.tools.inspection.slices import Slice
from nnunet_xattnres.tools.inspection.trained_model import Model


def inspect_case(
    model: Model,
    case: str,
    files: Sequence[str],
    folder: Path,
    formats: Sequence[str],
    knock_out: KnockOut | None = None,
) -> None:
    """Predict a case and write the segmentation, the weight maps, their means and pictures into `folder`.

    files: the images of the case, one per channel. formats: of the pictures, "png" or "pdf".
    knock_out: the sources without which the case is predicted again.

    The maps are written one by one, because all of them together do not fit into memory.

    Raises `XAttnResError` for images that do not fit the model, and `OSError` if a file cannot be written.
    """
    image, properties = model.read(files)
    references = knock_out.references if knock_out else None
    reference = references.read(case, image, properties) if references else None

    def as_image(volume: Volume | LabelMap) -> nibabel.Nifti1Image:
        return as_nifti(volume, properties, Path(files[0]))

    logits, weights = model.predict(image, properties)
    prediction = model.segmentation(logits, properties)
    _write_segmentation(model, prediction, properties, folder)
    inside = model.in_image_geometry(np.ones(logits.shape[1:], np.float32), properties) > 0.5
    regions = Regions(prediction, inside, model.labels)
    shown = Slice(as_image(prediction))
    picture = CasePicture(
        f"{case}, {shown.name}" if shown.name else case,
        shown.of(as_image(image[0])),
        shown.of(as_image(prediction)).astype(int),
        shown.spacing,
        model.labels,
    )
    # By target, label, place and source.
    means: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    maps, is_single = model.maps(weights, properties), model.predictor.allow_tqdm
    with tqdm(maps, total=model.num_maps, unit="map", disable=not is_single) as progress:
        for target, source, weight_map in progress:
            volume = as_image(weight_map)
            nibabel.save(volume, folder / f"{target}_from_{source}.nii.gz")
            picture.maps.setdefault(target, {})[source] = shown.of(volume), regions.foreground_mean(weight_map)
            for label, places in regions.means(weight_map).items():
                for place, mean in places.items():
                    means.setdefault(target, {}).setdefault(label, {}).setdefault(place, {})[source] = mean
    record = {
        "model": str(model.folder.parent),
        "trainer": model.trainer,
        "fold": model.fold,
        "checkpoint": model.checkpoint_name,
        "images": [str(file) for file in files],
        "note": CAVEAT,
        "voxels": regions.voxels,
        "mean_weights": means,
    }
    if knock_out:
        foreground_means = {
            (target, source): mean
            for target, of_target in picture.maps.items()
            for source, (_, mean) in of_target.items()
        }
        effects = knock_out.of_case(image, properties, prediction, reference, foreground_means)
        record["share_changed" if reference is None else "dice_change"] = _by_target(effects)
    (folder / "routing.json").write_text(json.dumps(record, indent=2, allow_nan=False))
    for file_format in formats:
        save_figure(lambda: draw_case(picture), folder / f"routing.{file_format}")


def _write_segmentation(model: Model, prediction: LabelMap, properties: dict[str, Any], folder: Path) -> None:
    try:
        model.reader.write_seg(prediction, str(folder / f"prediction{model.dataset_json['file_ending']}"), properties)
    except RuntimeError as error:  # SimpleITK raises it for a full disk
        raise OSError(one_line(str(error))) from None


def _by_target(effects: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By target, source and label. None stands for NaN, which JSON does not have."""
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for (target, source), of_pair in effects.items():
        nested.setdefault(target, {})[source] = {
            label: None if isnan(effect) else round(effect, DECIMALS) for label, effect in of_pair.items()
        }
    return nested
