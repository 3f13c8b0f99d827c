"""Files and folders: written as a whole or not at all; JSON that is read."""

import json

import pytest

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import read_json, write_json_atomically


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "plans.json"
    write_json_atomically({"version": 1}, path)
    with pytest.raises(TypeError):
        write_json_atomically({"version": 2, "unwritable": object()}, path)
    assert json.loads(path.read_text()) == {"version": 1}
    with path.open() as reader:
        write_json_atomically({"version": 2}, path)
        assert json.load(reader) == {"version": 1}
    assert json.loads(path.read_text()) == {"version": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "cannot read {path} (No such file or directory): copy it there"),
        (b"{", "{path} is not valid JSON (Expecting property name"),
        (b'"\xff"', "{path} is not valid JSON ("),
        (b"[]", "{path} holds no JSON object: copy it there"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_the_remedy(content, complaint, tmp_path):
    path = tmp_path / "plans.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(XAttnResError) as error:
        read_json(path, "copy it there")
    assert complaint.format(path=path) in str(error.value)
    assert str(error.value).endswith(": copy it there")
