"""What a driver is asked to load is what the manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.ipc.errors import InvalidArgument
from llmos.services import manifest
from llmos.services.manifest import ModelSpec
from llmos.services.models.hosting import Model, load_request


def test_pages_are_a_models_own_unless_it_shares_an_arena(tmp_path: Path) -> None:
    own = load_request(Model(ModelSpec(name="m"), tmp_path), tmp_path)
    assert (own.arena, own.arena_bytes) == ("own", 0)
    spec = ModelSpec(name="m", arena="shared", arena_size="2GiB")
    shared = load_request(Model(spec, tmp_path), tmp_path)
    assert (shared.arena, shared.arena_bytes) == ("shared", 2 << 30)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('arena = "common"', "common"),
        ('arena_size = "auto"', "how many bytes of arena_size"),
        ('arena_size = "big"', "a size is bytes"),
    ],
)
def test_a_wrong_arena_is_refused_before_anything_starts(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "llmos.toml"
    file.write_text(f'[[drivers]]\nname = "jax0"\n[[models]]\nname = "m"\n{line}\n')
    with pytest.raises(InvalidArgument, match=reason):
        manifest.load(file)
