"""How many pages the tiers get where a load request says it in bytes, or leaves it to the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.drivers.sdk import sizes
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument
from llmos.services import manifest


def request(**more: int) -> LoadRequest:
    return LoadRequest(model="m", source="", **more)  # type: ignore[arg-type]


def test_bytes_become_whole_pages() -> None:
    got = sizes.with_tiers(request(host_bytes=1000, disk_bytes=2500), 300, no_host=True)
    assert (got.host_pages, got.disk_pages) == (3, 8)


def test_pages_win_over_bytes() -> None:
    assert sizes.with_tiers(request(host_pages=7, host_bytes=1000), 300, no_host=False).host_pages == 7


def test_left_to_the_driver_half_of_the_free_ram_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:  40 kB\n")
    monkeypatch.setattr(sizes, "MEMINFO", tmp_path / "meminfo")
    assert sizes.with_tiers(request(host_bytes=-1), 1024, no_host=False).host_pages == 20
    assert sizes.with_tiers(request(host_bytes=-1), 1024, no_host=True).host_pages == 0


def test_where_the_system_does_not_say_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sizes, "MEMINFO", tmp_path / "none")
    assert sizes.with_tiers(request(host_bytes=-1), 1024, no_host=False).host_pages == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [(5, 5), ("5", 5), ("5B", 5), ("2KB", 2000), ("2KiB", 2048), ("1.5GiB", 3 << 29), ("auto", -1)],
)
def test_the_manifest_has_sizes_with_units(text: str | int, count: int) -> None:
    assert manifest.size(text) == count


@pytest.mark.parametrize("text", ["", "-1", -1, "8 gigs", "GiB", "1e9"])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(InvalidArgument, match="a size is bytes"):
        manifest.size(text)
