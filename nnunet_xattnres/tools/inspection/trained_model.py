"""A trained model that puts out its attention weights, run with nnU-Net's own preprocessing and inference."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_xattnres.common.device import free_memory, is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.nnunet.datasets import names_of_values
from nnunet_xattnres.nnunet.folders import hint_if_unset
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork, from_file
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.ops.alignment import resize
from nnunet_xattnres.tools.inspection.regions import LabelMap, Volume
from nnunet_xattnres.training.checkpoint import choose_fold, read_checkpoint
from nnunet_xattnres.training.mixin import check_preset

# nnU-Net blends tiles in half precision. The corner of a tile can have the weight 6e-8, the smallest number of that
# precision. The centre of a tile has the weight 10, and up to eight centres overlap. With this factor the attention
# weights neither vanish in the corners nor overflow.
BLENDING_SCALE = 256

# Memory in bytes, measured on a CPU beside the image itself. nnU-Net blends in half precision. After the last tile, its
# search for infinity takes 3 bytes more.
KEPT_PER_CHANNEL = 2
PEAK_PER_CHANNEL = 5
BLENDED_WEIGHT = 2
# Then the logits return to the geometry of the image, all at once, in double precision if they are resampled. After
# them the maps do, one by one, with what their means need.
RETURNED_PER_HEAD = 8
RETURNED_PER_MAP = 32


class NetworkWithWeights(nn.Module):
    """A network whose output has additional channels: its attention weights at the resolution of the image.

    nnU-Net's sliding window mirrors and blends these channels as it does logits. They are scaled by `BLENDING_SCALE`.
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
    """The K attention weights of a target, one by one, (*size) in float32. They sum to one.

    blended: (K, *size) in half precision, from the sliding window. Dividing by the sum over K removes the scale and
    rounding errors.
    """
    total = torch.zeros(blended.shape[1:])
    for weights in blended:
        total += weights
    for weights in blended:
        yield weights / total


class Model:
    """One fold of a trained model, to inspect cases with nnU-Net's own preprocessing and inference.

    folder: the model folder. fold: None for the only one that has the checkpoint. checkpoint_name: of a file in the
        fold's folder. targets: their names. None: all.
    trust_checkpoint: see `read_checkpoint`.
    sources: the names of the sources of every chosen target.

    Raises `XAttnResError` if there is no readable checkpoint of an XAttnRes trainer, for the second stage of a cascade,
    and for an unknown target.
    """

    def __init__(
        self,
        folder: Path,
        fold: str | None,
        checkpoint_name: str,
        targets: list[str] | None,
        device: torch.device,
        trust_checkpoint: bool = False,
    ) -> None:
        self.fold = choose_fold(folder, fold, checkpoint_name) or "*"  # there is none, which is said below
        self.folder = folder / f"fold_{self.fold}"
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
        self.channel_names = planned.channel_names
        self.label_manager = self.plans.get_label_manager(self.dataset_json)
        self.labels = {0: "background"} | names_of_values(self.dataset_json["labels"])
        self.reader = self.plans.image_reader_writer_class()
        self.preprocessor = self.configuration.preprocessor_class(verbose=False)
        self.network = self._trained_network(planned, checkpoint)
        with self.network.routing(targets) as weights:  # raises for a target that the network does not have
            self.sources = {target: self.network.routing_sources[target] for target in weights}
        # The predictor prints a message on a CPU.
        with redirect_stdout(io.StringIO()):
            self.predictor = nnUNetPredictor(device=device, allow_tqdm=False)
            self.predictor.manual_initialization(
                self.network,
                self.plans,
                self.configuration,
                None,
                self.dataset_json,
                self.trainer,
                checkpoint.get("inference_allowed_mirroring_axes"),
            )
        # This replaces a network that nnU-Net may have compiled. The sliding window asks the label manager for the
        # number of channels.
        self.predictor.network = NetworkWithWeights(self.network, list(self.sources))
        self.num_heads = self.label_manager.num_segmentation_heads
        self.num_maps = sum(map(len, self.sources.values()))
        self.predictor.label_manager = SimpleNamespace(num_segmentation_heads=self.num_heads + self.num_maps)

    def read(self, files: Sequence[str]) -> tuple[Volume, dict[str, Any]]:
        """The image [channel, z, y, x], and its properties from nnU-Net's reader.

        Raises `XAttnResError` for files that cannot be read, that hold NaN or infinity, or that do not fit the model.
        """
        printed = io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(io.StringIO()):
                image, properties = self.reader.read_images(files)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = one_line(printed.getvalue() or str(error)) or type(error).__name__
            raise XAttnResError(f"cannot read {', '.join(files)} ({reason}): get the files again") from None
        if not np.isfinite(image).all():
            raise XAttnResError(f"{', '.join(files)} hold values that are no numbers: replace them first")
        if len(image) != len(self.channel_names):
            channels = [f"_{number:04d} {name}" for number, name in enumerate(self.channel_names)]
            missing = channels[len(image) :]
            raise XAttnResError(
                f"{files[0]} comes with {counted(len(image), 'channel')}, "
                f"but the model reads {len(self.channel_names)}: "
                f"{'add ' * bool(missing)}{', '.join(missing or channels)}"
            )
        return image, properties

    def predict(self, image: Volume, properties: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (classes, *size), and blended weights (K, *size) by target, of the preprocessed image.

        Both are in half precision. nnU-Net's preprocessing adds entries to `properties`.

        Raises `XAttnResError` if the network puts out NaN or infinity, and `MemoryError` before the first tile if what
        comes after the last one would not fit into memory.
        """
        data = self._preprocessed(image, properties)
        self._check_memory(data.shape[1:], image.shape[1:])
        channels = self._slide(data)
        logits, *weights = channels.split([self.num_heads, *map(len, self.sources.values())])
        return logits, dict(zip(self.sources, weights, strict=True))

    def segmentations_without(
        self, image: Volume, properties: dict[str, Any], pairs: Iterable[tuple[str, str]]
    ) -> Iterator[tuple[tuple[str, str], LabelMap]]:
        """Label maps [z, y, x] of an image that `predict` has predicted, each without one source of one target.

        pairs: targets and sources.
        """
        data = self._preprocessed(image, properties)
        predictor = self.predictor
        before = predictor.network, predictor.label_manager, predictor.allow_tqdm
        predictor.network, predictor.label_manager, predictor.allow_tqdm = self.network, self.label_manager, False
        try:
            for target, source in pairs:
                with self.network.without(target, source):
                    logits = self._slide(data)
                yield (target, source), self.segmentation(logits, properties)
        finally:
            predictor.network, predictor.label_manager, predictor.allow_tqdm = before

    def _preprocessed(self, image: Volume, properties: dict[str, Any]) -> Tensor:
        data, _, _ = self.preprocessor.run_case_npy(
            image, None, properties, self.plans, self.configuration, self.dataset_json
        )
        return torch.from_numpy(data)

    def _slide(self, data: Tensor) -> Tensor:
        """What the predictor's network puts out for a preprocessed image, all channels in half precision."""
        channels = self.predictor.predict_sliding_window_return_logits(data).cpu()
        # One after the other, because a copy of all channels may not fit into memory.
        if not all(channel.isfinite().all() for channel in channels):
            raise XAttnResError(
                f"the network of {self.folder} answers with values that are no numbers: choose the checkpoint of a "
                "training that has not diverged"
            )
        return channels

    def _check_memory(self, preprocessed: Sequence[int], original: Sequence[int]) -> None:
        """Raise `MemoryError` for images of these sizes if there is too little memory. Choose where tiles are blended.

        On a GPU with too little memory nnU-Net would begin again with that of the CPU, after any number of tiles.
        """
        blending, returning = self.memory_needed(preprocessed, original)
        device = self.predictor.device
        on_gpu = device.type == "cuda" and blending < torch.cuda.mem_get_info(device)[0]
        self.predictor.perform_everything_on_device = on_gpu
        needed, free = returning if on_gpu else max(blending, returning), free_memory()
        if needed > free:
            raise MemoryError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def memory_needed(self, preprocessed: Sequence[int], original: Sequence[int]) -> tuple[int, int]:
        """Bytes beside images of these sizes: for blending tiles, and for what comes after it."""
        patch = self.configuration.patch_size
        in_plane = map(max, preprocessed[-len(patch) :], patch)  # nnU-Net pads a small image
        padded = prod([*preprocessed[: -len(patch)], *in_plane])
        channels = self.num_heads + self.num_maps
        returned = (prod(preprocessed) + prod(original)) * max(RETURNED_PER_HEAD * self.num_heads, RETURNED_PER_MAP)
        blending = padded * (PEAK_PER_CHANNEL * channels + BLENDED_WEIGHT)
        return blending, padded * KEPT_PER_CHANNEL * channels + returned

    def maps(
        self, weights: Mapping[str, Tensor], properties: dict[str, Any]
    ) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
        """Target, source and weight map [z, y, x] in the geometry of the image, one map after the other."""
        for target, sources in self.sources.items():
            for source, of_source in zip(sources, shares(weights[target]), strict=True):
                yield target, source, self.in_image_geometry(of_source.numpy(), properties)

    def segmentation(self, logits: Tensor, properties: dict[str, Any]) -> LabelMap:
        """The label map [z, y, x] in the geometry of the image."""
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.plans,
            self.configuration,
            self.label_manager,
            properties,
            num_threads_torch=torch.get_num_threads(),
        )

    def in_image_geometry(self, weights: Volume, properties: dict[str, Any]) -> NDArray[np.float32]:
        """Resample, pad with zeros what was cropped, and transpose weights, as nnU-Net does with probabilities."""
        spacing = [properties["spacing"][axis] for axis in self.plans.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        # A 2D configuration does not resample across slices.
        network_spacing = [*spacing[: len(shape) - len(self.configuration.spacing)], *self.configuration.spacing]
        resampled = self.configuration.resampling_fn_probabilities(weights[None], shape, network_spacing, spacing)
        whole = np.zeros(properties["shape_before_cropping"], np.float32)
        insert_crop_into_image(whole, np.asarray(resampled)[0], properties["bbox_used_for_cropping"])
        return whole.transpose(self.plans.transpose_backward)

    def _trained_network(self, planned: PlannedNetwork, checkpoint: dict[str, Any]) -> PlannedUNet:
        trainer = find_trainer(self.trainer)
        network = planned.build(trainer, deep_supervision=False)
        if not isinstance(network, PlannedUNet) or not network.routing_sources:
            raise XAttnResError(
                f"{self.folder} was trained by {self.trainer}, whose network has no attention to inspect: choose a "
                "model of an XAttnRes trainer"
            )
        if "xattnres" in checkpoint["init_args"]:
            check_preset(str(self.folder / self.checkpoint_name), checkpoint, network, self.trainer, "inspect it")
        try:
            network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:
            raise XAttnResError(
                f"the weights in {self.folder} are not those of today's {self.trainer} ({one_line(str(error))[:200]}): "
                "use the version that trained it"
            ) from None
        return network


def _read_checkpoint(model: Path, path: Path, trusted: bool) -> dict[str, Any]:
    if not path.exists():
        there = [str(file.relative_to(model)) for file in sorted(model.glob("fold_*/*.pth"))]
        if not there:
            problem = "holds no fold_*/*.pth" if model.exists() else "does not exist"
            raise XAttnResError(
                f"{model} {problem}: -m takes a model's folder in nnUNet_results, "
                f"TRAINER__PLANS__CONFIGURATION{hint_if_unset('nnUNet_results', model)}"
            )
        raise XAttnResError(f"{path} does not exist: choose with -f and -chk from {', '.join(there)}")
    return read_checkpoint(path, "choose another -chk, or get it again", trusted)
