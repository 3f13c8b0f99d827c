"""What a trained model reads in any case: weight maps in the image's geometry, their means, and a picture."""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_xattnres.alignment import resize
from nnunet_xattnres.checkpoint import FINAL_CHECKPOINT, finished_folds, read_checkpoint
from nnunet_xattnres.commands import termination_as_exception
from nnunet_xattnres.datasets import check_nifti_files
from nnunet_xattnres.device import choose_device
from nnunet_xattnres.errors import XAttnResError, one_line
from nnunet_xattnres.network import PlannedUNet
from nnunet_xattnres.report import names_of_values
from nnunet_xattnres.routing.drawing import CasePicture, draw_case, draw_history, save_figure
from nnunet_xattnres.routing.nifti import write_nifti
from nnunet_xattnres.routing.recording import DECIMALS, RECORD, RoutingHistory
from nnunet_xattnres.trainer_lookup import find_trainer

PLACES = ("interior", "boundary")

# nnU-Net blends tiles in half precision, and a tile's corners count as little as its smallest number, 6e-8, while up to
# eight centres that count 10 may meet. Weights that are so much larger neither vanish in the corners nor overflow.
BLENDING_SCALE = 256

Volume = NDArray[np.floating]
LabelMap = NDArray[np.integer]


@dataclass(frozen=True)
class Options:
    """What the command takes.

    model: a folder of nnUNet_results, TRAINER__PLANS__CONFIGURATION. fold: its number, or "all".
    images: a folder, or files, named as nnU-Net wants them.
    output: gets a folder per case.
    targets: by name; None for all.
    device: "cpu" or "cuda"; None for a GPU where there is one.
    pdf: pictures as vectors too.
    trust_checkpoint: see `read_checkpoint`.
    """

    model: Path
    fold: str
    images: list[Path]
    output: Path
    targets: list[str] | None
    device: str | None
    pdf: bool
    trust_checkpoint: bool


def run_inspect(options: Options) -> None:
    """Write what the model reads in every case.

    Raises `XAttnResError` for a folder that holds no XAttnRes model, a target that the model does not have, and images
    that cannot be read or do not fit the model.
    """
    model = Model(
        options.model,
        options.fold,
        options.targets,
        torch.device(choose_device(options.device)),
        options.trust_checkpoint,
    )
    cases = find_cases(options.images, model.dataset_json["file_ending"])
    check_nifti_files(Path(file) for files in cases.values() for file in files)
    formats = ["png", "pdf"] if options.pdf else ["png"]
    with (
        termination_as_exception(),
        _staging_folder(options.output) as staging,
        tqdm(cases.items(), unit="case") as progress,
    ):
        for case, files in progress:
            progress.set_postfix_str(case)
            folder = staging / case
            folder.mkdir()
            try:
                inspect_case(model, case, files, folder, formats)
                _put(folder, options.output / case)
            except OSError as error:
                raise XAttnResError(
                    f"cannot write the maps of {case} ({error}): make room or choose --targets"
                ) from None
        record = model.folder / RECORD
        if options.pdf and record.is_file():
            history = RoutingHistory.read(record)
            save_figure(lambda: draw_history(history), options.output / "training.pdf")


def inspect_case(model: "Model", case: str, files: Sequence[str], folder: Path, formats: Sequence[str]) -> None:
    """Write the maps of a case one after the other: all of them do not fit into memory."""
    image, properties = model.read(files)
    logits, weights = model.predict(image, properties)
    prediction = model.segmentation(logits, properties)
    try:
        model.reader.write_seg(prediction, str(folder / f"prediction{model.dataset_json['file_ending']}"), properties)
    except RuntimeError as error:  # SimpleITK's for a full disk
        raise OSError(one_line(str(error))) from None
    regions = Regions(prediction, model.in_image_geometry(np.ones_like(weights[0]), properties) > 0.5, model.labels)
    plane = int((prediction > 0).sum(axis=(1, 2)).argmax())
    picture = CasePicture(
        case, plane, image[0, plane], prediction[plane], tuple(properties["spacing"][1:]), model.labels
    )
    means: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    maps = iter(weights)
    for target, sources in model.sources.items():
        by_source = {}
        for source in sources:
            weight_map = model.in_image_geometry(next(maps), properties)
            write_nifti(weight_map, folder / f"{target}_from_{source}.nii.gz", properties, Path(files[0]))
            by_source[source] = regions.means(weight_map)
            in_slice = weight_map[plane].copy(), regions.foreground_mean(weight_map)
            picture.maps.setdefault(target, {})[source] = in_slice
        means[target] = {
            label: {place: {source: by_source[source][label][place] for source in sources} for place in places}
            for label, places in regions.voxels.items()
        }
    record = {
        "model": str(model.folder.parent),
        "trainer": model.trainer,
        "fold": model.fold,
        "images": [str(file) for file in files],
        "voxels": regions.voxels,
        "mean_weights": means,
    }
    (folder / "routing.json").write_text(json.dumps(record, indent=2, allow_nan=False))
    for file_format in formats:
        save_figure(lambda: draw_case(picture), folder / f"routing.{file_format}")


class NetworkWithWeights(nn.Module):
    """The logits of a network and, as further channels, the weights of targets, at the resolution of the image.

    nnU-Net's sliding window then mirrors and blends weights, times `BLENDING_SCALE`, as it does logits.
    """

    def __init__(self, network: PlannedUNet, targets: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.targets = targets

    def forward(self, image: Tensor) -> Tensor:
        """image (B, channels, *size) -> (B, classes + all weights, *size)"""
        with self.network.routing(self.targets) as weights:
            logits = self.network(image)
        maps = [resize(weights[target][0].transpose(0, 1), image.shape[2:]) for target in self.targets]
        return torch.cat((logits, *(BLENDING_SCALE * weights_of_target for weights_of_target in maps)), dim=1)


class Model:
    """One fold of a trained model, ready to inspect cases with nnU-Net's own preprocessing and inference.

    sources: of the chosen targets.
    """

    def __init__(
        self, folder: Path, fold: str, targets: list[str] | None, device: torch.device, trust_checkpoint: bool = False
    ) -> None:
        self.fold = fold
        self.folder = folder / f"fold_{fold}"
        self.dataset_json = _read_json(folder / "dataset.json")
        self.plans = PlansManager(_read_json(folder / "plans.json"))
        checkpoint = _read_checkpoint(folder, self.folder, trust_checkpoint)
        self.trainer = checkpoint["trainer_name"]
        self.configuration = self.plans.get_configuration(checkpoint["init_args"]["configuration"])
        if self.configuration.previous_stage_name is not None:
            raise XAttnResError(
                f"{folder} is the second stage of a cascade, which needs predictions of the first: inspect the model "
                f"of {self.configuration.previous_stage_name}"
            )
        self.num_channels = determine_num_input_channels(self.plans, self.configuration, self.dataset_json)
        self.label_manager = self.plans.get_label_manager(self.dataset_json)
        self.labels = {0: "background"} | names_of_values(self.dataset_json["labels"])
        self.reader = self.plans.image_reader_writer_class()
        self.preprocessor = self.configuration.preprocessor_class(verbose=False)
        network = self._network(checkpoint["network_weights"])
        self.sources = {target: network.routing_sources[target] for target in _chosen(targets, network)}
        # It says on stdout what it does on a CPU.
        with redirect_stdout(io.StringIO()):
            self.predictor = nnUNetPredictor(device=device, allow_tqdm=False)
            self.predictor.manual_initialization(
                network,
                self.plans,
                self.configuration,
                None,
                self.dataset_json,
                self.trainer,
                checkpoint.get("inference_allowed_mirroring_axes"),
            )
        # Uncompiled, whatever the environment says; and the sliding window asks how many channels there will be.
        self.predictor.network = NetworkWithWeights(network, list(self.sources))
        self.num_heads = self.label_manager.num_segmentation_heads
        num_maps = sum(map(len, self.sources.values()))
        self.predictor.label_manager = SimpleNamespace(num_segmentation_heads=self.num_heads + num_maps)

    def read(self, files: Sequence[str]) -> tuple[Volume, dict[str, Any]]:
        """[channel, z, y, x], and what nnU-Net's reader knows of its geometry."""
        complaints = io.StringIO()
        try:
            with redirect_stdout(complaints), redirect_stderr(io.StringIO()):
                image, properties = self.reader.read_images(files)
        except Exception as error:
            reason = one_line(complaints.getvalue() or str(error)) or type(error).__name__
            raise XAttnResError(f"cannot read {', '.join(files)} ({reason}): get the files again") from None
        if not np.isfinite(image).all():
            raise XAttnResError(f"{', '.join(files)} hold values that are no numbers: replace them first")
        if len(image) != self.num_channels:
            channels = ", ".join(f"_{int(k):04d} {name}" for k, name in self.dataset_json["channel_names"].items())
            raise XAttnResError(
                f"{files[0]} comes with {len(image)} channels, but the model reads {self.num_channels}: {channels}"
            )
        return image, properties

    def predict(self, image: Volume, properties: dict[str, Any]) -> tuple[Tensor, NDArray[np.float32]]:
        """Logits and weights [map, ...] as nnU-Net preprocesses the image; `properties` takes in what it did."""
        data, _, _ = self.preprocessor.run_case_npy(
            image, None, properties, self.plans, self.configuration, self.dataset_json
        )
        channels = self.predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
        logits, weights = channels[: self.num_heads], channels[self.num_heads :].float().numpy()
        # That removes the scale and what half precision has rounded.
        for of_target in np.split(weights, np.cumsum([len(sources) for sources in self.sources.values()])[:-1]):
            of_target /= of_target.sum(axis=0)
        return logits, weights

    def segmentation(self, logits: Tensor, properties: dict[str, Any]) -> LabelMap:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.plans,
            self.configuration,
            self.label_manager,
            properties,
            num_threads_torch=torch.get_num_threads(),
        )

    def in_image_geometry(self, weights: Volume, properties: dict[str, Any]) -> NDArray[np.float32]:
        """Resampled, uncropped (zero outside) and transposed as nnU-Net does it with probabilities."""
        spacing = [properties["spacing"][axis] for axis in self.plans.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        # A 2D configuration leaves the slices as they are.
        network_spacing = [*spacing[: len(shape) - len(self.configuration.spacing)], *self.configuration.spacing]
        resampled = self.configuration.resampling_fn_probabilities(weights[None], shape, network_spacing, spacing)
        whole = np.zeros(properties["shape_before_cropping"], np.float32)
        insert_crop_into_image(whole, np.asarray(resampled)[0], properties["bbox_used_for_cropping"])
        return whole.transpose(self.plans.transpose_backward)

    def _network(self, weights: Mapping[str, Tensor]) -> PlannedUNet:
        network = find_trainer(self.trainer).build_network_architecture(
            self.plans,
            self.configuration,
            self.num_channels,
            self.label_manager.num_segmentation_heads,
            enable_deep_supervision=False,
        )
        if not isinstance(network, PlannedUNet) or not network.routing_sources:
            raise XAttnResError(
                f"{self.folder} was trained by {self.trainer}, whose network has no attention to inspect: choose a "
                "model of an XAttnRes trainer"
            )
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise XAttnResError(
                f"the weights in {self.folder} are not those of today's {self.trainer} ({one_line(str(error))[:200]}): "
                "use the version that trained it"
            ) from None
        return network


class Regions:
    """Where means are taken: by predicted label, boundary voxels (with a neighbour of another label) and interior.

    Only `inside`, where the network was: nnU-Net crops to the part of an image that is not zero.
    voxels: how many, by label and place; what does not occur is left out.
    """

    def __init__(self, prediction: LabelMap, inside: NDArray[np.bool_], labels: Mapping[int, str]) -> None:
        self._inside = inside
        self._index = 2 * prediction[inside].astype(np.intp) + on_boundary(prediction)[inside]
        self._counts = np.bincount(self._index, minlength=2)
        self._names = {value: labels.get(value, f"label {value}") for value in range((len(self._counts) + 1) // 2)}
        self.voxels: dict[str, dict[str, int]] = {}
        for region, label, place in self._regions():
            self.voxels.setdefault(label, {})[place] = int(self._counts[region])

    def means(self, weight_map: Volume) -> dict[str, dict[str, float]]:
        sums = self._sums(weight_map)
        means: dict[str, dict[str, float]] = {}
        for region, label, place in self._regions():
            means.setdefault(label, {})[place] = round(float(sums[region] / self._counts[region]), DECIMALS)
        return means

    def foreground_mean(self, weight_map: Volume) -> float:
        """Over all predicted labels but the background; over everything where nothing else is predicted."""
        start = 2 if self._counts[2:].any() else 0
        return float(self._sums(weight_map)[start:].sum() / self._counts[start:].sum())

    def _sums(self, weight_map: Volume) -> NDArray[Any]:
        return np.bincount(self._index, weights=weight_map[self._inside], minlength=2)

    def _regions(self) -> Iterator[tuple[int, str, str]]:
        for region in np.flatnonzero(self._counts):
            yield int(region), self._names[int(region) // 2], PLACES[int(region) % 2]


def on_boundary(labels: LabelMap) -> NDArray[np.bool_]:
    """Which voxels have a neighbour, along an axis, of another label."""
    boundary = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        differs = np.diff(labels.astype(np.int32), axis=axis) != 0
        before, after = [slice(None)] * labels.ndim, [slice(None)] * labels.ndim
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        boundary[tuple(before)] |= differs
        boundary[tuple(after)] |= differs
    return boundary


def find_cases(images: Sequence[Path], file_ending: str) -> dict[str, list[str]]:
    """By case, the files of its channels: CASE_0000, CASE_0001, ... and the dataset's ending."""
    files: list[Path] = []
    for path in images:
        if not path.exists():
            raise XAttnResError(f"{path} does not exist: give images or a folder of images")
        files += sorted(path.glob(f"*{file_ending}")) if path.is_dir() else [path]
    cases: dict[str, list[str]] = {}
    for file in files:
        name = re.fullmatch(r"(.+)_\d{4}" + re.escape(file_ending), file.name)
        if name is None:
            raise XAttnResError(f"{file} is not named as nnU-Net wants it: CASE_0000{file_ending}, _0001 and so on")
        cases.setdefault(name[1], []).append(str(file))
    if not cases:
        raise XAttnResError(f"no image that ends in _0000{file_ending} in {', '.join(map(str, images))}")
    return {case: sorted(set(of_case)) for case, of_case in cases.items()}


def _chosen(targets: list[str] | None, network: PlannedUNet) -> list[str]:
    # Raises for what the network does not have.
    with network.routing(targets) as weights:
        return list(weights)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise XAttnResError(
            f"{path} does not exist: -m takes a model's folder in nnUNet_results, TRAINER__PLANS__CONFIGURATION"
        ) from None
    except (OSError, ValueError) as error:
        raise XAttnResError(f"cannot read {path} ({one_line(str(error))}): get the model again") from None


def _read_checkpoint(model: Path, fold: Path, trusted: bool) -> dict[str, Any]:
    path = fold / FINAL_CHECKPOINT
    if not path.exists():
        folds = finished_folds(model)
        raise XAttnResError(f"{path} does not exist; finished folds in {model}: {', '.join(folds) or 'none'}")
    return read_checkpoint(path, "get it again", trusted)


@contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """A folder inside `output` from which finished cases are moved to their places. Gone afterwards."""
    is_new = not output.exists()
    staging = output / f".{os.getpid()}.tmp"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise XAttnResError(f"cannot write to {output} ({error.strerror}): choose another -o") from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(output.iterdir()):
            output.rmdir()


def _put(folder: Path, place: Path) -> None:
    """Move a finished folder to its place, which may hold an earlier result."""
    if place.exists():
        place.rename(folder.with_name(f"{folder.name}.old"))
    folder.rename(place)
