"""Decoder processes: what they give back, and that they die alone."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.infer import decoders
from jobs.infer.decoders import DecoderPool, DecoderStartError, Limits, Pixels
from jobs.infer.rows import Failure
from jobs.lake.failpoints import VARIABLE
from maskrcnn_core.images import DecodeError, decode_image
from schemas.labels import ErrorKind

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")


def encode(seed: int, height: int = 30, width: int = 40, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def children(of: int | None = None) -> set[int]:
    """Processes of this one, or of another, zombies among them."""
    parent = of or os.getpid()
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(path.parent.name))
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


Make = Callable[..., DecoderPool]


@pytest.fixture
def make() -> Iterator[Make]:
    """Pools that are closed, with a look at what they leave behind."""
    pools: list[DecoderPool] = []
    before = children()

    def pool(num: int = 1, **limits: float) -> DecoderPool:
        pools.append(DecoderPool(num, Limits(**limits)))  # type: ignore[arg-type]  # the fields' own types
        return pools[-1]

    yield pool
    for each in pools:
        each.close()
    assert children() <= before


def decode(pool: DecoderPool, *images: tuple[str, bytes]) -> list[Pixels | Failure]:
    return [future.result(timeout=60)[0] for future in [pool.submit(*image) for image in images]]


def kinds(outcomes: list[Pixels | Failure]) -> list[str]:
    return [o.kind.value if isinstance(o, Failure) else "pixels" for o in outcomes]


def test_pixels_come_back_as_if_they_had_been_decoded_here(make: Make) -> None:
    files = [encode(0), encode(1, form="JPEG"), encode(2, 700, 900, "BMP"), encode(3, 1, 1), encode(4)]
    outcomes = decode(make(2), *((str(n), data) for n, data in enumerate(files)))
    for outcome, data in zip(outcomes, files, strict=True):
        assert isinstance(outcome, np.ndarray)
        np.testing.assert_array_equal(outcome, decode_image(data))
        assert outcome.flags.writeable
        assert outcome.flags.c_contiguous


def test_a_refusal_comes_back_in_the_same_words(make: Make) -> None:
    files = [b"", b"<html>", encode(0)[:50], bytes(100)]
    outcomes = decode(make(), *(("猫\0\n\ud800" * 1500, data) for data in files))
    for outcome, data in zip(outcomes, files, strict=True):
        with pytest.raises(DecodeError) as refusal:
            decode_image(data)
        assert outcome == Failure(ErrorKind(refusal.value.kind), str(refusal.value))


def test_the_pixel_ceiling_is_the_callers(make: Make) -> None:
    assert kinds(decode(make(max_pixels=1199), ("x", encode(0)))) == ["too_large"]


def test_pixels_stay_as_long_as_somebody_looks_at_them_and_their_memory_is_used_again(make: Make) -> None:
    pool = make()
    held = decode(pool, *((str(n), encode(n)) for n in range(20)))
    rows = [pixels[7:9] for pixels in held if isinstance(pixels, np.ndarray)]
    del held
    gc.collect()
    places = {row.__array_interface__["data"][0] for row in rows}
    assert len(places) == 20
    decode(pool, *((str(n), encode(n)) for n in range(100, 130)))
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row, decode_image(encode(n))[7:9])
    num_places = len(os.listdir("/proc/self/fd"))
    del rows, row
    decode(pool, *((str(n), encode(n)) for n in range(40)))
    assert len(os.listdir("/proc/self/fd")) == num_places


def test_an_image_that_kills_its_decoder_is_named_and_its_neighbours_decode(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "decode_image=bad:kill")
    images = [("a", encode(0)), ("b", encode(1)), ("bad", encode(2)), ("c", encode(3)), ("d", encode(4))]
    outcomes = decode(make(), *images)
    assert kinds(outcomes) == ["pixels", "pixels", "crashed", "pixels", "pixels"]
    assert isinstance(outcomes[2], Failure)
    assert outcomes[2].message == (
        f"2 decoder processes died on these {len(images[2][1])} bytes, the last one of SIGKILL"
    )


def test_a_decoder_that_somebody_killed_costs_no_image(make: Make) -> None:
    pool = make()
    before = children()
    decode(pool, ("a", encode(0)))
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    assert kinds(decode(pool, ("b", encode(1)), ("c", encode(2)))) == ["pixels", "pixels"]


def test_an_image_on_which_the_decoder_hangs_is_stopped_when_its_time_is_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "decode_image=bad:hang")
    outcomes = decode(make(timeout_s=1.0), ("a", encode(0)), ("bad", encode(1)), ("b", encode(2)))
    assert kinds(outcomes) == ["pixels", "timeout", "pixels"]
    assert isinstance(outcomes[1], Failure)
    assert "took longer than 1 s" in outcomes[1].message


def test_an_image_that_asks_for_too_much_memory_is_too_large_and_the_decoder_lives_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "decode_image=bad:memory")
    pool = make(max_bytes=200 << 20)
    before = children()
    decode(pool, ("a", encode(0)))
    (child,) = children() - before
    outcomes = decode(pool, ("bad", encode(1)), ("b", encode(2)))
    assert kinds(outcomes) == ["too_large", "pixels"]
    assert child in children()


def test_ctrl_c_is_left_to_the_parent(make: Make) -> None:
    pool = make()
    before = children()
    decode(pool, ("a", encode(0)))
    (child,) = children() - before
    os.kill(child, signal.SIGINT)
    assert kinds(decode(pool, ("b", encode(1)))) == ["pixels"]
    assert child in children()
    assert os.getsid(child) != os.getsid(0)


def test_closing_ends_a_decoder_that_hangs_and_cancels_what_waits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "decode_image=bad:hang")
    pool = make()
    futures = [pool.submit("bad", encode(0)), *(pool.submit("a", encode(n)) for n in range(9))]
    time.sleep(0.5)
    pool.close()
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("a", encode(0))


def test_a_pool_that_is_let_go_leaves_no_process_and_no_open_file(make: Make) -> None:
    decode(make(), ("a", encode(0)))  # whatever the first one opens for good
    before, files = children(), len(os.listdir("/proc/self/fd"))
    pool = DecoderPool(2)
    decode(pool, ("a", encode(0)), ("b", encode(1)))
    del pool
    gc.collect()
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"])
def test_decoders_end_with_their_parent_however_it_ends(ending: str) -> None:
    script = f"""
import os, signal, sys, time
from jobs.infer.decoders import DecoderPool
from tests.infer.test_decoders import children, encode
pool = DecoderPool(2)
pool.submit("a", encode(0)).result()
pool.submit("hangs", encode(0))
time.sleep(0.5)
print(*children(), flush=True)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, VARIABLE: "decode_image=hangs:hang", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=200,
    )
    orphans = [int(pid) for pid in done.stdout.split()]
    assert orphans, done.stderr
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
    assert "Traceback" not in done.stderr


def test_a_decoder_that_cannot_start_is_our_own_fault_and_no_images(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_MODULE", "jobs.no_such_module")
    with pytest.raises(DecoderStartError, match=r"jobs\.no_such_module"):
        make().submit("a", encode(0)).result(timeout=60)


def test_a_decoder_loads_neither_torch_nor_ray() -> None:
    script = "import sys, jobs.infer.decode_child; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "ray", "pyarrow", "pydantic"} & set(loaded.split())
