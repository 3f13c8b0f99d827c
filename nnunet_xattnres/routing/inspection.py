"""What a trained model reads in any case: weight maps in the image's geometry, their means, and a picture."""

import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import psutil
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
from nnunet_xattnres.checkpoint import read_checkpoint
from nnunet_xattnres.commands import termination_as_exception
from nnunet_xattnres.datasets import check_nifti_files
from nnunet_xattnres.device import choose_device, is_out_of_memory, limit_memory
from nnunet_xattnres.errors import XAttnResError, one_line
from nnunet_xattnres.network import PlannedUNet
from nnunet_xattnres.report import names_of_values
from nnunet_xattnres.routing.drawing import CasePicture, draw_case, draw_history, save_figure
from nnunet_xattnres.routing.nifti import as_nifti
from nnunet_xattnres.routing.recording import DECIMALS, RECORD, RoutingHistory
from nnunet_xattnres.routing.slices import Slice
from nnunet_xattnres.sources import from_file
from nnunet_xattnres.trainer import check_preset
from nnunet_xattnres.trainer_lookup import find_trainer

PLACES = ("interior", "boundary")
OWN_FILES = re.compile(r"routing\.(json|png|pdf)|prediction\..+|[^.]+_from_[^.]+\.nii\.gz")
NO_ROOM = (ENOSPC, EDQUOT, None)  # SimpleITK says no number

# nnU-Net blends tiles in half precision, and a tile's corners count as little as its smallest number, 6e-8, while up to
# eight centres that count 10 may meet. Weights that are so much larger neither vanish in the corners nor overflow.
BLENDING_SCALE = 256

Volume = NDArray[np.floating]
LabelMap = NDArray[np.integer]


@dataclass(frozen=True)
class Options:
    """What the command takes.

    model: a folder of nnUNet_results, TRAINER__PLANS__CONFIGURATION. fold: its number, or "all".
    checkpoint: the name of a file in the fold's folder.
    images: a folder, or files, named as nnU-Net wants them.
    output: gets a folder per case.
    targets: by name; None for all.
    device: "cpu" or "cuda"; None for a GPU where there is one.
    pdf: pictures as vectors too.
    trust_checkpoint: see `read_checkpoint`.
    """

    model: Path
    fold: str
    checkpoint: str
    images: list[Path]
    output: Path
    targets: list[str] | None
    device: str | None
    pdf: bool
    trust_checkpoint: bool


def run_inspect(options: Options) -> None:
    """Write what the model reads in every case.

    Raises `XAttnResError` for a folder that holds no XAttnRes model, a target that the model does not have, images that
    cannot be read or do not fit the model, and too little memory.
    """
    device = torch.device(choose_device(options.device))
    if device.type == "cpu":
        limit_memory(psutil.virtual_memory().available + psutil.swap_memory().free)
    model = Model(options.model, options.fold, options.checkpoint, options.targets, device, options.trust_checkpoint)
    cases = find_cases(options.images, model.dataset_json["file_ending"])
    for case in cases:
        _check_place(options.output / case)
    with _want_explained("the images", device):
        check_nifti_files(Path(file) for files in cases.values() for file in files)
    history = _history_of(model) if options.pdf else None
    formats = ["png", "pdf"] if options.pdf else ["png"]
    # A bar over the cases or, where there is only one, over its tiles and then its maps: they would break each other.
    single = len(cases) == 1
    model.predictor.allow_tqdm = single
    with (
        termination_as_exception(),
        _staging_folder(options.output) as staging,
        tqdm(cases.items(), unit="case", disable=single) as progress,
    ):
        for case, files in progress:
            progress.set_postfix_str(case)
            folder = staging / case
            folder.mkdir()
            with _want_explained(case, device):
                inspect_case(model, case, files, folder, formats)
                _put(folder, options.output / case)
        if history is not None:
            with _want_explained("the training", device):
                save_figure(lambda: draw_history(history), options.output / "training.pdf")


def inspect_case(model: "Model", case: str, files: Sequence[str], folder: Path, formats: Sequence[str]) -> None:
    """Write the maps of a case one after the other: all of them do not fit into memory."""
    image, properties = model.read(files)

    def as_image(volume: Volume | LabelMap) -> nibabel.Nifti1Image:
        return as_nifti(volume, properties, Path(files[0]))

    logits, weights = model.predict(image, properties)
    prediction = model.segmentation(logits, properties)
    try:
        model.reader.write_seg(prediction, str(folder / f"prediction{model.dataset_json['file_ending']}"), properties)
    except RuntimeError as error:  # SimpleITK's for a full disk
        raise OSError(one_line(str(error))) from None
    everywhere = np.ones(logits.shape[1:], np.float32)
    regions = Regions(prediction, model.in_image_geometry(everywhere, properties) > 0.5, model.labels)
    shown = Slice(as_image(prediction))
    picture = CasePicture(
        f"{case}, {shown.name}" if shown.name else case,
        shown.of(as_image(image[0])),
        shown.of(as_image(prediction)).astype(int),
        shown.spacing,
        model.labels,
    )
    means: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    with tqdm(
        model.maps(weights, properties), total=model.num_maps, unit="map", disable=not model.predictor.allow_tqdm
    ) as maps:
        for target, source, weight_map in maps:
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


def shares(blended: Tensor) -> Iterator[Tensor]:
    """Of what the sliding window has blended for a target, (K, *size) in half precision, the K weights one by one.

    float32. They sum to one: that removes the scale and what half precision has rounded.
    """
    total = torch.zeros(blended.shape[1:])
    for weights in blended:
        total += weights
    for weights in blended:
        yield weights / total


class Model:
    """One fold of a trained model, ready to inspect cases with nnU-Net's own preprocessing and inference.

    sources: of the chosen targets.
    """

    def __init__(
        self,
        folder: Path,
        fold: str,
        checkpoint_name: str,
        targets: list[str] | None,
        device: torch.device,
        trust_checkpoint: bool = False,
    ) -> None:
        self.fold = fold
        self.folder = folder / f"fold_{fold}"
        checkpoint = _read_checkpoint(folder, self.folder / checkpoint_name, trust_checkpoint)
        self.checkpoint_name = checkpoint_name
        self.trainer = checkpoint["trainer_name"]
        planned = from_file(folder / "plans.json", checkpoint["init_args"].get("configuration"))
        self.dataset_json, self.configuration = planned.dataset_json, planned.manager
        self.plans = PlansManager(planned.plans)
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
        network = self._network(checkpoint)
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
        self.num_maps = sum(map(len, self.sources.values()))
        self.predictor.label_manager = SimpleNamespace(num_segmentation_heads=self.num_heads + self.num_maps)

    def read(self, files: Sequence[str]) -> tuple[Volume, dict[str, Any]]:
        """[channel, z, y, x], and what nnU-Net's reader knows of its geometry."""
        complaints = io.StringIO()
        try:
            with redirect_stdout(complaints), redirect_stderr(io.StringIO()):
                image, properties = self.reader.read_images(files)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = one_line(complaints.getvalue() or str(error)) or type(error).__name__
            raise XAttnResError(f"cannot read {', '.join(files)} ({reason}): get the files again") from None
        if not np.isfinite(image).all():
            raise XAttnResError(f"{', '.join(files)} hold values that are no numbers: replace them first")
        if len(image) != self.num_channels:
            channels = [f"_{int(k):04d} {name}" for k, name in self.dataset_json["channel_names"].items()]
            missing = channels[len(image) :]
            raise XAttnResError(
                f"{files[0]} comes with {len(image)} channels, but the model reads {self.num_channels}: "
                f"{'add ' * bool(missing)}{', '.join(missing or channels)}"
            )
        return image, properties

    def predict(self, image: Volume, properties: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and, by target, blended weights (K, *size), both in half precision, as nnU-Net preprocesses the image.

        `properties` takes in what it did.
        """
        data, _, _ = self.preprocessor.run_case_npy(
            image, None, properties, self.plans, self.configuration, self.dataset_json
        )
        channels = self.predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
        if not channels.isfinite().all():
            raise XAttnResError(
                f"the network of {self.folder} answers with values that are no numbers: choose the checkpoint of a "
                "training that has not diverged"
            )
        logits, *weights = channels.split([self.num_heads, *map(len, self.sources.values())])
        return logits, dict(zip(self.sources, weights, strict=True))

    def maps(
        self, weights: Mapping[str, Tensor], properties: dict[str, Any]
    ) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
        """Target, source, and weights in the image's geometry, one map after the other."""
        for target, sources in self.sources.items():
            for source, of_source in zip(sources, shares(weights[target]), strict=True):
                yield target, source, self.in_image_geometry(of_source.numpy(), properties)

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

    def _network(self, checkpoint: dict[str, Any]) -> PlannedUNet:
        trainer = find_trainer(self.trainer)
        network = trainer.build_network_architecture(
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
        if "xattnres" in checkpoint["init_args"]:
            check_preset(str(self.folder / self.checkpoint_name), checkpoint, trainer, "inspect it")
        try:
            network.load_state_dict(checkpoint["network_weights"])
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
    """By case, the files of its channels: CASE_0000, CASE_0001, ... and the dataset's ending.

    What a folder holds beside them is not looked at. Raises `XAttnResError` for a file of another name, and for a
    channel that is missing or there twice.
    """
    cases = _channels_by_case(images, file_ending)
    if not cases:
        raise XAttnResError(f"no image that ends in _0000{file_ending} in {', '.join(map(str, images))}")
    for case, channels in cases.items():
        missing = sorted(set(range(max(channels))) - channels.keys())
        if missing:
            names = ", ".join(f"{case}_{channel:04d}{file_ending}" for channel in missing)
            raise XAttnResError(f"{channels[max(channels)]} comes without {names}: add what is missing")
    return {case: [str(channels[number]) for number in sorted(channels)] for case, channels in cases.items()}


def _channels_by_case(images: Sequence[Path], file_ending: str) -> dict[str, dict[int, Path]]:
    pattern = re.compile(r"([^.].*)_(\d{4})" + re.escape(file_ending))
    cases: dict[str, dict[int, Path]] = {}
    for path in images:
        if not path.exists():
            raise XAttnResError(f"{path} does not exist: give images or a folder of images")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            name = pattern.fullmatch(file.name)
            if name is not None:
                earlier = cases.setdefault(name[1], {}).setdefault(int(name[2]), file)
                if not earlier.samefile(file):
                    raise XAttnResError(f"{earlier} and {file} are the same channel of {name[1]}: leave one out")
            elif file is path:
                raise XAttnResError(f"{file} is not named as nnU-Net wants it: CASE_0000{file_ending}, _0001 and so on")
    return cases


def _chosen(targets: list[str] | None, network: PlannedUNet) -> list[str]:
    # Raises for what the network does not have.
    with network.routing(targets) as weights:
        return list(weights)


def _read_checkpoint(model: Path, path: Path, trusted: bool) -> dict[str, Any]:
    if not path.exists():
        there = [str(file.relative_to(model)) for file in sorted(model.glob("fold_*/*.pth"))]
        if not there:
            raise XAttnResError(
                f"{model} holds no fold_*/*.pth: -m takes a model's folder in nnUNet_results, "
                "TRAINER__PLANS__CONFIGURATION"
            )
        raise XAttnResError(f"{path} does not exist: choose with -f and -chk from {', '.join(there)}")
    return read_checkpoint(path, "get it again", trusted)


def _history_of(model: Model) -> RoutingHistory | None:
    """What the training has recorded, if it has."""
    try:
        return RoutingHistory.read(model.folder / RECORD)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XAttnResError(f"cannot read {error.filename} ({error.strerror}): leave --pdf out") from None


@contextmanager
def _want_explained(what: str, device: torch.device) -> Iterator[None]:
    """A full disk, a file that cannot be read or written, or too little memory, in one line."""
    try:
        yield
    except OSError as error:
        remedy = "make room or choose --targets" if error.errno in NO_ROOM else "see to that file and run again"
        raise XAttnResError(f"cannot go on with {what} ({error}): {remedy}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "choose fewer --targets" + ", or --device cpu" * (device.type == "cuda")
        raise XAttnResError(f"too little memory for {what}: {remedy}") from None


@contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """A folder inside `output` from which finished cases are moved to their places. Gone afterwards."""
    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(mkdtemp(prefix=".inspect_", dir=output))
    except OSError as error:
        raise XAttnResError(f"cannot write to {output} ({error.strerror}): choose another -o") from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in new:
            if not any(folder.iterdir()):
                folder.rmdir()


def _check_place(place: Path) -> None:
    """Raise `XAttnResError` if there is something that an earlier run has not written, for it would be replaced."""
    foreign = [place] if place.is_file() else [file for file in place.glob("*") if not OWN_FILES.fullmatch(file.name)]
    if foreign:
        raise XAttnResError(f"{foreign[0]} is not from inspect, which would replace {place}: choose another -o")


def _put(folder: Path, place: Path) -> None:
    """Move a finished folder to its place, which may hold an earlier result."""
    if place.exists():
        place.rename(folder.with_name(f"{folder.name}.old"))
    folder.rename(place)
