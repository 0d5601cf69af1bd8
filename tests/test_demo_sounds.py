"""Demo sounds: whole or not at all, the same bytes for the same seed, faults that change the sound."""
import hashlib

import numpy as np
import pytest
import soundfile

from adiff.data.files import find_sounds
from adiff.data.sound_files import read_sound
from adiff.core import InputError
from adiff.data.demo_sounds import make_demo_sounds, sound_faults


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in find_sounds(folder)}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = digests(make_demo_sounds(tmp_path / "a", seed=3, train=2, good=1, per_fault=1))
    more = digests(make_demo_sounds(tmp_path / "b", seed=3, train=3, good=1, per_fault=1))
    assert len(first) == 9 and len(set(first.values())) == 9 and first.items() < more.items()
    other = digests(make_demo_sounds(tmp_path / "c", seed=4, train=2, good=1, per_fault=1))
    assert not set(first.values()) & set(other.values())


def test_layout_and_format(tmp_path):
    folder = make_demo_sounds(tmp_path / "a", train=1, good=1, per_fault=1)
    assert set(digests(folder)) == {"pump/train/good/000.wav", "pump/test/good/000.wav",
                                    *(f"pump/test/{fault}/000.wav" for fault in sound_faults)}
    for path in find_sounds(folder):
        header = soundfile.info(path)
        assert (header.samplerate, header.channels, header.frames, header.subtype) == (16000, 1, 64000, "PCM_16")
        level = 20 * np.log10(float(read_sound(path, 16000).std()))
        assert -45 < level < -15


def test_what_is_there_is_kept_and_nothing_is_overwritten(tmp_path):
    folder = make_demo_sounds(tmp_path / "a", train=1, good=1, per_fault=1)
    written = [path.stat().st_mtime_ns for path in find_sounds(folder)]
    make_demo_sounds(folder, train=1, good=1, per_fault=1)
    assert [path.stat().st_mtime_ns for path in find_sounds(folder)] == written
    with pytest.raises(InputError, match="something else"):
        make_demo_sounds(folder, seed=1, train=1, good=1, per_fault=1)
    (folder / "pump/test/good/000.wav").unlink()
    with pytest.raises(InputError, match="something else"):
        make_demo_sounds(folder, train=1, good=1, per_fault=1)
