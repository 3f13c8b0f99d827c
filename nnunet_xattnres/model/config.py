"""What a user can choose about XAttnRes."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from nnunet_xattnres.common.errors import XAttnResError

FUSIONS = ("replace", "residual")
BACKENDS = ("auto", "reference", "streaming", "native", "triton")


@dataclass(frozen=True)
class XAttnResConfig:
    """Stage-level XAttnRes: which stages read from the history pool, and how the mixture enters a stage.

    skip_connections: keep nnU-Net's skip connections beside the attention, or let the attention replace them.
    read_in_encoder, read_in_decoder: where stages read from the pool.
    fusion: `"replace"`, as in the paper: the mixture over pool and input replaces the stage's input. `"residual"`: the
        mixture over the pool alone, times a gate per channel that is zero at initialisation, is added to the input.
    backend: how the attention is computed: `"auto"`, `"reference"`, `"streaming"`, `"native"` (on a CPU) or `"triton"`
        (on a GPU). All compute the same.

    Raises `XAttnResError` for a value that does not exist.
    """

    skip_connections: bool = True
    read_in_encoder: bool = True
    read_in_decoder: bool = True
    fusion: str = "replace"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_flags(self, "skip_connections", "read_in_encoder", "read_in_decoder")
        _check_choice(self, "fusion", FUSIONS)
        _check_choice(self, "backend", BACKENDS)

    @classmethod
    def of_planned_network(cls) -> "XAttnResConfig":
        """The config of the network that nnU-Net planned."""
        return cls(read_in_encoder=False, read_in_decoder=False)

    @property
    def is_planned_network(self) -> bool:
        """Whether the network is the one that nnU-Net planned, with nothing added and nothing removed."""
        return self.skip_connections and not self.read_in_encoder and not self.read_in_decoder

    @property
    def has_attention(self) -> bool:
        """Whether there is anything for a backend to compute."""
        return self.read_in_encoder or self.read_in_decoder

    def architecture(self) -> dict[str, Any]:
        """The fields that decide what a trained network computes, for the record in its checkpoint."""
        return _all_but_backend(self)


@dataclass(frozen=True)
class BlockXAttnResConfig:
    """Block-level XAttnRes: attention among the blocks of a stage (ISAR) and in place of a skip connection (DKVMR).

    isar_in_encoder, isar_in_decoder: where blocks read from the earlier blocks of their stage. This has an effect only
        in stages of three or more blocks, which only the encoders of ResEnc plans have. With `bank_includes_input` two
        blocks are enough.
    bank_includes_input: the stage's input opens the bank that its blocks read from (not in the authors' code).
    kv_ratio: the number of channels of DKVMR's keys, as a fraction of the memory's.
    temperature: divides ISAR's scores.
    backend: as in `XAttnResConfig`. Here, `"native"` and `"triton"` are `"streaming"`, because they compute stage level
        only.

    Raises `XAttnResError` for a value that does not exist.
    """

    isar_in_encoder: bool = False
    isar_in_decoder: bool = True
    bank_includes_input: bool = False
    kv_ratio: float = 0.5
    temperature: float = 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_flags(self, "isar_in_encoder", "isar_in_decoder", "bank_includes_input")
        _check_positive(self, "kv_ratio", "temperature")
        _check_choice(self, "backend", BACKENDS)

    @property
    def has_attention(self) -> bool:
        """Whether there is anything for a backend to compute: DKVMR always."""
        return True

    def architecture(self) -> dict[str, Any]:
        """The fields that decide what a trained network computes, for the record in its checkpoint."""
        return _all_but_backend(self)


Config = XAttnResConfig | BlockXAttnResConfig


def _check_flags(config: Config, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise XAttnResError(f"{_field(config, name)} must be True or False, not {getattr(config, name)!r}")


def _check_choice(config: Config, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        listed = ", ".join(choices)
        raise XAttnResError(f"{_field(config, name)} must be one of {listed}, not {getattr(config, name)!r}")


def _check_positive(config: Config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < inf:
            raise XAttnResError(f"{_field(config, name)} must be a positive number, not {value!r}")


def _field(config: Config, name: str) -> str:
    return f"{type(config).__name__}.{name}"


def _all_but_backend(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "backend"}
