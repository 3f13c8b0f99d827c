"""The cost of one network, measured in a process of its own: `python -m nnunet_xattnres.overhead.measurement FOLDER`.

The process reads a `Request` from FOLDER/request.json and writes an `Answer` to FOLDER/answer.json. Network, loss,
optimizer, autocast and compilation are those of the nnU-Net trainer.
"""

import json
import os
import sys
import timeit
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import file_ending_dataset_mapping
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.flop_counter import FlopCounterMode

from nnunet_xattnres.common.device import PeakMemory, is_out_of_memory, limit_memory
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.planned_unet import PlannedUNet, uncompiled
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.ops.backends import attention_backend, chosen_backend
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin, config_of

MEASURED = "measured"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"

# On a GPU, the first steps compile and try cuDNN's algorithms, and they are skipped until the loss scale fits.
WARM_UP_STEPS = {"cpu": 1, "cuda": 5, "mps": 5}
# Repetitions are timed for so long, but at least one.
STEP_SECONDS = 3.0
INFERENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Request:
    """One network to measure.

    device: "cpu", "cuda" or "mps". backend: of the attention. None for the trainer's own.
    inference: measure the prediction of a volume, and no training step.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    trainer: str
    device: str
    backend: str | None = None
    inference: bool = False


@dataclass(frozen=True)
class Answer:
    """The results of one process. Results that it did not reach are None or empty.

    status: `MEASURED`, `OUT_OF_MEMORY` or `FAILED`.
    reason: why it failed, in one line.
    flops: of the matrix products and convolutions of one training step, or with `Request.inference` of one patch.
    reads_at: the stages that read from the pool, E2, E3, ..., D0, D1, ... At block level: the parts that read.
    computed_by: the backend of the training steps, or with `Request.inference` of the prediction. None where nothing
        reads. computed_by_reason: why this one, in one line.
    inference_computed_by: the backend of `inference_seconds`. A prediction measures no backends.
    step_seconds: one per repetition of a training step.
    inference_seconds: one per repetition of the inference of one patch, or with `Request.inference` of a volume.
    peak_memory: in bytes during a training step, see `PeakMemory`.
    kept_for_backward: in bytes, see the function of this name.
    compiled: whether nnU-Net compiled the network for what was measured.
    threads: that PyTorch computes with.
    device_name: of the GPU.
    """

    status: str
    reason: str = ""
    parameters: int | None = None
    flops: int | None = None
    reads_at: list[str] = field(default_factory=list)
    computed_by: str | None = None
    computed_by_reason: str = ""
    inference_computed_by: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    inference_seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    kept_for_backward: int | None = None
    compiled: bool | None = None
    threads: int | None = None
    device_name: str | None = None


def main() -> None:
    folder = Path(sys.argv[1])
    request = Request(**json.loads((folder / "request.json").read_text()))
    if request.device == "cpu":
        limit_memory(psutil.virtual_memory().available)
    for answer in measure(request):
        write_json_atomically(asdict(answer), folder / "answer.json")


def measure(request: Request) -> Iterator[Answer]:
    """Yield an answer whenever more is known. The last one counts: a process that is killed leaves the one before."""
    answer = Answer(FAILED)
    try:
        measurement = Measurement(request)
        try:
            answer = replace(answer, **measurement.counts(torch.device("meta")))
            yield answer
        except XAttnResError:
            raise
        except Exception:
            pass  # The network cannot be built on the meta device. Counts are made below, on the trainer's device.
        costs = measurement.inference_costs() if request.inference else measurement.costs()
        answer = replace(answer, **costs)
        try:
            counts = {}
            if answer.flops is None:
                counts = measurement.counts(measurement.trainer.device)
            elif answer.computed_by != answer.inference_computed_by:
                # The training measured the backends and took another one than was counted.
                answer = replace(answer, flops=None)
                counts = measurement.counts(torch.device("meta"), answer.computed_by)
            answer = replace(answer, **counts | costs)
        except Exception:
            pass  # What has been measured counts without these counts, too.
        yield replace(answer, status=MEASURED)
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            yield replace(answer, status=OUT_OF_MEMORY)
        else:
            yield replace(answer, status=FAILED, reason=_reason(error))


def _reason(error: Exception) -> str:
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    return one_line(message if isinstance(error, XAttnResError) else f"{type(error).__name__}: {message}")


class Measurement:
    """One trainer on one configuration of the plans. It works in the folders of nnU-Net's environment variables.

    Raises `XAttnResError` if nnU-Net finds no such trainer.
    """

    def __init__(self, request: Request) -> None:
        trainer_class = find_trainer(request.trainer)
        if request.backend is not None and issubclass(trainer_class, XAttnResTrainerMixin):
            trainer_class.xattnres_config = replace(trainer_class.xattnres_config, backend=request.backend)
        if request.device == "cuda":
            # As in nnUNetv2_train. On a CPU, that command takes all cores. Here OMP_NUM_THREADS counts.
            torch.set_num_threads(1)
            torch.backends.cudnn.benchmark = True
        self.inference = request.inference
        self.planned = PlannedNetwork(request.trainer, request.plans, request.configuration, request.dataset_json)
        self.trainer = self.planned.make_trainer(trainer_class, fold=0, device=request.device)

    def counts(self, device: torch.device, backend: str | None = None) -> dict[str, Any]:
        """Parameters, FLOPs of one training step or of the inference of one patch, and the stages that read.

        device: "meta" for shapes alone. On any other device, the trainer must be initialised: its network is used.
        backend: to count with on the meta device. None for the one that computes where none is measured.
        FLOPs are None where the network does not run, as one that needs values on the meta device.
        """
        trainer = self.trainer
        with device:
            network = trainer.network and uncompiled(trainer.network)
            if network is None or device.type == "meta":
                network = self.planned.build(type(trainer), deep_supervision=not self.inference)
                backend = backend or _unmeasured_backend(network, trainer.device)[0]
                if backend is not None and isinstance(network, XAttnResUNet):
                    for attention in network.xattnres.values():
                        # "auto" would take the meta device for a CPU.
                        attention.attend = attention_backend(backend)  # type: ignore[assignment]
        return {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": self._flops(network, device),
            "reads_at": list(network.routing_sources) if isinstance(network, PlannedUNet) else [],
            "threads": torch.get_num_threads(),
            "device_name": torch.cuda.get_device_name() if trainer.device.type == "cuda" else None,
        }

    def _flops(self, network: nn.Module, device: torch.device) -> int | None:
        batch_size = 1 if self.inference else self.planned.manager.batch_size
        shape = (batch_size, self.planned.num_input_channels, *self.planned.manager.patch_size)
        try:
            with FlopCounterMode(display=False) as counter, torch.inference_mode(self.inference):
                outputs = network(torch.zeros(shape, device=device))
                if not self.inference:
                    sum(output.sum() for output in (outputs if isinstance(outputs, list) else [outputs])).backward()
        except XAttnResError:
            raise
        except Exception:
            return None
        return int(counter.get_total_flops())

    def costs(self) -> dict[str, Any]:
        """Time and memory of training steps, what is kept for the backward pass, time of inference."""
        trainer = self.trainer
        load_libraries()
        memory = PeakMemory(trainer.device)
        _place_dataset(Path(trainer.preprocessed_dataset_folder))
        trainer.initialize()
        backend, reason = predicting_backend, _ = _unmeasured_backend(trainer.network, trainer.device)
        if backend is not None and isinstance(trainer, XAttnResTrainerMixin):
            backend, measured = trainer.choose_backend()  # as a training does when it starts
            reason = measured or reason
        batch = self._batch()
        trainer.network.train()
        for _ in range(WARM_UP_STEPS[trainer.device.type]):
            trainer.train_step(batch)
        # Sampling takes time, so this step is not timed. It shows the peak: the optimizer has its state from the second
        # step on.
        with memory.observed():
            trainer.train_step(batch)
        step_seconds = _times(lambda: trainer.train_step(batch), STEP_SECONDS)
        with self._autocast():
            kept = kept_for_backward(trainer.network, batch["data"])
        return {
            "step_seconds": step_seconds,
            "peak_memory": memory.peak,
            "kept_for_backward": kept,
            "compiled": isinstance(trainer.network, OptimizedModule),
            "computed_by": backend,
            "computed_by_reason": reason,
            "inference_computed_by": predicting_backend,
            "inference_seconds": self._inference_seconds(batch["data"][:1]),
        }

    def inference_costs(self) -> dict[str, Any]:
        """Time in which nnU-Net's predictor predicts a volume of noise, two patches long along every axis."""
        trainer = self.trainer
        network = self._predicting_network()
        backend, reason = _unmeasured_backend(network, trainer.device)
        predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
        # nnU-Net calls it when training starts. It says along which axes a trained network is mirrored.
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        predictor.manual_initialization(
            network,
            trainer.plans_manager,
            trainer.configuration_manager,
            [network.state_dict()],
            trainer.dataset_json,
            type(trainer).__name__,
            trainer.inference_allowed_mirroring_axes,
        )
        patch_size = trainer.configuration_manager.patch_size
        # A 2D patch is one slice.
        patch = torch.randn(self.planned.num_input_channels, *(1,) * (3 - len(patch_size)), *patch_size)
        volume = patch.repeat(1, 2, 2, 2)
        predictor.predict_logits_from_preprocessed_data(patch)
        return {
            "inference_seconds": _times(
                lambda: predictor.predict_logits_from_preprocessed_data(volume), INFERENCE_SECONDS
            ),
            "compiled": isinstance(predictor.network, OptimizedModule),
            "computed_by": backend,
            "computed_by_reason": reason,
            "inference_computed_by": backend,
            "threads": min(torch.get_num_threads(), default_num_processes),  # as the predictor sets them
        }

    def _batch(self) -> dict[str, Any]:
        """Noise and random labels on the device, with the shapes and types that nnU-Net's augmentation gives."""
        trainer = self.trainer
        size = trainer.configuration_manager.patch_size
        data = torch.randn(trainer.batch_size, trainer.num_input_channels, *size, device=trainer.device)
        scales = trainer._get_deep_supervision_scales()
        if scales is None:
            return {"data": data, "target": self._target(size)}
        sizes = [[round(extent * s) for extent, s in zip(size, scale, strict=True)] for scale in scales]
        return {"data": data, "target": [self._target(scaled) for scaled in sizes]}

    def _target(self, size: list[int]) -> Tensor:
        trainer, labels = self.trainer, self.trainer.label_manager
        if labels.has_regions:
            # One channel per region, then the mask of the ignore label.
            channels = len(labels.foreground_regions) + labels.has_ignore_label
            return torch.randint(2, (trainer.batch_size, channels, *size), dtype=torch.bool, device=trainer.device)
        shape = (trainer.batch_size, 1, *size)
        return torch.randint(len(labels.all_labels), shape, dtype=torch.int16, device=trainer.device)

    def _inference_seconds(self, patch: Tensor) -> list[float]:
        """Seconds for one patch, computed as nnU-Net's predictor does, without mirroring."""
        network: Callable[[Tensor], object] = self._predicting_network().to(self.trainer.device).eval()
        # The predictor compiles only on request.
        if os.environ.get("nnUNet_compile", "").lower() in ("true", "1", "t"):
            network = torch.compile(network)
        with torch.inference_mode(), self._autocast():
            network(patch)
            return _times(lambda: network(patch), INFERENCE_SECONDS)

    def _predicting_network(self) -> nn.Module:
        """The network as nnU-Net's predictor builds it, not that of the training, whose backend may be another."""
        return self.planned.build(type(self.trainer), deep_supervision=False)

    def _autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where nnU-Net has it."""
        return torch.autocast("cuda") if self.trainer.device.type == "cuda" else nullcontext()


def _unmeasured_backend(network: nn.Module, device: torch.device) -> tuple[str | None, str]:
    """The backend that computes a network's attention where none is measured, as in prediction, and why in one line.

    None for a network without attention.
    """
    config = config_of(network)
    if not config.has_attention:
        return None, ""
    backend, why = chosen_backend(config.backend, device.type, isinstance(config, XAttnResConfig))
    return backend, why or ("named" if backend == config.backend else f"{config.backend!r} on {device.type}")


def kept_for_backward(network: nn.Module, images: Tensor) -> int:
    """The bytes of what autograd keeps from the forward to the backward pass of a network, parameters excluded.

    A storage counts once and as a whole, also if several operations keep parts of it.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def load_libraries() -> None:
    """Run a tiny training step: the libraries that PyTorch loads on first use are no cost of the network."""
    network = nn.Conv3d(1, 1, 3)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    network(torch.zeros(1, 1, 8, 8, 8)).sum().backward()
    nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()


def _times(function: Callable[[], object], seconds: float) -> list[float]:
    """Seconds per call. Calls are repeated until they took `seconds` altogether, at least once."""
    # Imported only in the process that measures: without a GPU, but with CUDA_HOME set, it prints a warning.
    from torch.utils.benchmark import timer

    # `timer` waits for the GPU.
    stopwatch = timeit.Timer(function, timer=timer)
    times = [stopwatch.timeit(1)]
    while sum(times) < seconds:
        times.append(stopwatch.timeit(1))
    return times


def _place_dataset(folder: Path) -> None:
    """Make the file from which nnU-Net infers the storage format. It is never opened."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"case.{next(iter(file_ending_dataset_mapping))}").touch()


if __name__ == "__main__":
    main()
