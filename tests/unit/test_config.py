"""The stage-level configuration: values that do not exist, and what belongs to the architecture."""

import pytest

from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError


@pytest.mark.parametrize(
    "field, value", [("fusion", "sum"), ("backend", "cuda"), ("skip_connections", "yes"), ("read_in_encoder", None)]
)
def test_a_value_that_does_not_exist_is_named(field, value):
    with pytest.raises(XAttnResError, match=rf"{field}.*{value!r}"):
        XAttnResConfig(**{field: value})


def test_the_backend_is_not_part_of_the_architecture():
    assert XAttnResConfig(backend="reference").architecture() == XAttnResConfig().architecture()
    assert XAttnResConfig(fusion="residual").architecture() != XAttnResConfig().architecture()


@pytest.mark.parametrize(
    "config, planned",
    [
        (XAttnResConfig(read_in_encoder=False, read_in_decoder=False), True),
        (XAttnResConfig(read_in_encoder=False, read_in_decoder=False, skip_connections=False), False),
        (XAttnResConfig(read_in_encoder=False), False),
    ],
)
def test_only_reading_nowhere_with_skip_connections_is_the_planned_network(config, planned):
    assert config.is_planned_network is planned
