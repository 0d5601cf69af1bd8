"""Sounds: torchaudio beside a CPU-only torch, files good and bad, log-mel pictures, windows, real clips."""
import importlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from adiff.data import sound_files
from adiff.data.audioset_pictures import AudioSetPicture, sound_processor
from adiff.data.files import find_sounds
from adiff.data.sound_files import load_torchaudio, read_sound, sound_seconds
from adiff.data.sounds import LogMel
from adiff.core import InputError

RATE = 16000
SOUND = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)


def write(path, samples=SOUND, rate=RATE, subtype=None):
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def refused(source):
    with pytest.raises(InputError) as error:
        read_sound(source, RATE)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- torchaudio

@pytest.mark.slow
def test_torchaudio_is_imported_when_needed_only():
    code = "import sys, adiff.data.sounds; assert 'torchaudio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_stub_takes_the_place_of_the_missing_cuda_extension_and_says_so_once():
    code = """if True:
        import logging, sys, adiff.data.sounds
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s: %(message)s")
        import torch
        extension = torch.ops.load_library
        def missing(path):
            try:
                raise OSError("libc10_cuda.so: cannot open shared object file: No such file or directory")
            except OSError as error:
                raise OSError(f"Could not load this library: {path}") from error
        torch.ops.load_library = missing
        adiff.data.sound_files.load_torchaudio().transforms.MelSpectrogram()
        adiff.data.sound_files.load_torchaudio()"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ("adiff.data.sound_files: torch has no CUDA here: "
                           "torchaudio is used without its compiled extension\n")


@pytest.mark.parametrize("error", [OSError("libsndfile.so: cannot open shared object file"),
                                   ImportError("no torchaudio")])
def test_no_other_import_error_is_hidden(monkeypatch, error):
    def fails(name):
        raise error
    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(type(error), match=str(error)):
        load_torchaudio()


# ---- files

@pytest.mark.parametrize("name, subtype", [("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT"),
                                           ("a.flac", "PCM_16")])
def test_lossless_formats(tmp_path, name, subtype):
    waveform = read_sound(write(tmp_path / name, subtype=subtype), RATE)
    assert waveform.dtype == torch.float32 and np.allclose(waveform, SOUND, atol=1e-4)


def test_eight_channels_are_averaged(tmp_path):
    channels = np.zeros((RATE, 8), np.float32)
    channels[:, 3] = SOUND
    waveform = read_sound(write(tmp_path / "8.wav", channels, subtype="FLOAT"), RATE)
    assert torch.allclose(waveform, torch.from_numpy(SOUND) / 8, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 96000])
def test_other_sample_rates_keep_the_pitch(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    waveform = read_sound(write(tmp_path / "tone.wav", tone, rate), RATE)
    assert len(waveform) == RATE and torch.fft.rfft(waveform).abs().argmax() == 1000
    stored = torch.from_numpy(soundfile.read(tmp_path / "tone.wav", dtype="float32")[0])
    assert torch.allclose(waveform, load_torchaudio().transforms.Resample(rate, RATE)(stored), atol=1e-6)


def test_a_sample_rate_without_a_common_divisor():
    tone = np.sin(2 * np.pi * 1000 * np.arange(44101) / 44101)
    waveform = read_sound((tone, 44101), RATE)
    assert abs(len(waveform) - RATE) <= 1 and torch.fft.rfft(waveform).abs().argmax() == 1000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_parts_are_parts_of_the_whole(tmp_path, name, rate):
    path = write(tmp_path / name, SOUND, rate)
    whole = read_sound(path, RATE)
    parts = [read_sound(path, RATE, start, 0.1) for start in np.arange(0, len(whole) / RATE, 0.1)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_arrays_mean_what_their_type_says():
    for values in (SOUND, SOUND.astype(np.float64), np.int16(SOUND * 32768), np.int32(SOUND * 2.0**31),
                   np.uint8(SOUND * 128 + 128)):
        assert np.allclose(read_sound((values, RATE), RATE), SOUND, atol=0.01)
    for values in (SOUND.astype(np.int64), SOUND * 30000, SOUND > 0, SOUND[None, None], np.zeros(0),
                   np.array([0, np.inf])):
        assert refused((values, RATE)).startswith("sound array: ")
    for rate in (16000.5, True, 0, "16000", None):
        assert "sample rate" in refused((SOUND, rate))
    assert "give (array, sample rate)" in refused((RATE, SOUND))  # scipy's order
    refused(SOUND), refused(None)


def test_a_sound_is_the_same_in_every_form(tmp_path):
    path = write(tmp_path / "a.wav", SOUND, subtype="FLOAT")
    content, torn = path.read_bytes(), path.read_bytes()[:-9]
    stereo = np.stack([SOUND, SOUND])
    with open(path, "rb") as file:
        for source in (content, io.BytesIO(content), file, str(path), (SOUND.astype(">f4"), RATE), (stereo, RATE),
                       (stereo.T, RATE), (torch.from_numpy(stereo).requires_grad_(), RATE)):
            for _ in range(2):
                assert torch.allclose(read_sound(source, RATE), torch.from_numpy(SOUND), atol=1e-6)
            assert sound_seconds(source) == 1
    assert refused(torn) == refused(io.BytesIO(torn)) and refused(torn).startswith("sound bytes: the sound is cut")
    assert LogMel().load(content).equal(LogMel().load(path))


def test_silent_and_clipped_sounds_are_sounds(tmp_path):
    processor = LogMel(seconds=1.024, size=64)
    clipped = np.clip(SOUND * 100, -1, 1)
    for samples in (np.zeros(RATE), clipped):
        tensor = processor.tensor(processor.read(write(tmp_path / "a.wav", samples)))
        assert tensor.isfinite().all() and tensor.min() >= -1 and tensor.max() < 1.5
    assert (processor.decibels(torch.zeros(RATE)) == -80).all()


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.wav")
    (tmp_path / "empty.wav").touch()
    assert "empty.wav: the file is empty" in refused(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("label,score\n")
    assert "text.wav: not a sound" in refused(tmp_path / "text.wav")
    assert "no sound" in refused(write(tmp_path / "short.wav", np.zeros(0)))
    assert "no sound" in refused(write(tmp_path / "short.ogg", np.zeros(0)))
    assert "NaN" in refused(write(tmp_path / "nan.wav", np.where(SOUND > 0.3, np.nan, SOUND), subtype="FLOAT"))
    assert "scale" in refused(write(tmp_path / "loud.wav", SOUND * 32768, subtype="FLOAT"))
    (tmp_path / "folder.wav").mkdir()
    refused(tmp_path / "folder.wav")
    with pytest.raises(InputError, match="missing.wav: no such file"):
        sound_seconds(tmp_path / "missing.wav")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, name):
    content = write(tmp_path / name).read_bytes()
    assert len(read_sound(tmp_path / name, RATE)) == RATE
    for length in (4, 30, 44, 60, len(content) // 2, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        assert refused(tmp_path / name).startswith(str(tmp_path / name))


def test_a_wav_of_unknown_length_is_read(tmp_path):
    content = bytearray(write(tmp_path / "stream.wav", subtype="PCM_16").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at:at + 4] = b"\xff" * 4
    (tmp_path / "stream.wav").write_bytes(content)
    assert len(read_sound(tmp_path / "stream.wav", RATE)) == RATE


# ---- every format

WAV = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610",
       "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32"]
FORMATS = [("WAV", subtype) for subtype in WAV] + [("WAVEX", "PCM_24"), ("WAVEX", "FLOAT"), ("RF64", "PCM_16"),
                                                   ("W64", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"),
                                                   ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
HUM = (0.3 * np.sin(np.arange(3 * RATE) / 8) + 0.02 * np.random.default_rng(0).standard_normal(3 * RATE))


def write_unseekable(path, container, subtype):
    "soundfile cannot write encodings in which it cannot seek, but at the very end."
    with soundfile.SoundFile(path, "w", RATE, 1, subtype, format=container) as file:
        try:
            file.write(HUM)
        except soundfile.SoundFileError as error:
            assert "unseekable" in str(error)


@pytest.mark.parametrize("container, subtype", FORMATS)
def test_every_encoding_is_read_whole_and_in_parts(tmp_path, container, subtype):
    write_unseekable(path := tmp_path / "sound", container, subtype)
    whole = read_sound(path, RATE)
    assert abs(sound_seconds(path) - 3) < 0.06 and len(whole) == round(sound_seconds(path) * RATE)
    found = min(np.sqrt(np.mean((whole[lag:lag + 40000].numpy() - HUM[:40000])**2)) for lag in range(2))
    assert found < (1e-4 if subtype in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE") else 0.1)
    parts = [read_sound(path, RATE, start, 0.25) for start in np.arange(12) / 4]
    assert torch.allclose(torch.cat(parts), whole[:3 * RATE], atol=2e-3)


@pytest.mark.parametrize("name, rate", [("a.ogg", 44100), ("a.ogg", 16000), ("a.mp3", 44100), ("a.mp3", 16000)])
def test_a_jump_into_a_lossy_file_lands_in_the_whole(tmp_path, name, rate):
    "libsndfile decodes the first packets after a jump wrongly."
    tone = 0.5 * np.sin(np.arange(8 * rate) / 20) + 0.02 * np.random.default_rng(0).standard_normal(8 * rate)
    whole = read_sound(write(tmp_path / name, tone, rate), rate)
    for start in np.random.default_rng(1).uniform(0, 7.9, 25):
        first = round(start * rate)
        assert torch.allclose(read_sound(tmp_path / name, rate, start, 0.1), whole[first:first + rate // 10], atol=1e-4)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x80000000, 0x7FFFF000])
def test_a_header_without_a_length_is_read_to_the_end(tmp_path, length):
    content = bytearray(write(tmp_path / "stream.wav", subtype="PCM_16").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = min(length + 36, 0xFFFFFFFF).to_bytes(4, "little")
    content[at:at + 4] = length.to_bytes(4, "little")
    (tmp_path / "stream.wav").write_bytes(content)
    assert sound_seconds(tmp_path / "stream.wav") == 1
    assert np.allclose(read_sound(tmp_path / "stream.wav", RATE), SOUND, atol=1e-4)
    content[at:at + 4] = (10**6).to_bytes(4, "little")  # a length that could be, but is not there
    (tmp_path / "stream.wav").write_bytes(content)
    assert "cut short" in refused(tmp_path / "stream.wav")


@pytest.mark.parametrize("container", ["RIFF", "RIFX", "RF64"])
@pytest.mark.parametrize("whole", ["right", "wrong"])
def test_no_length_although_the_whole_has_one(tmp_path, container, whole):
    "Recorders that lose power, and a 64-bit header whose lengths are all 0; an empty sound before a chunk is empty."
    endian = "BIG" if container == "RIFX" else "FILE"
    soundfile.write(path := tmp_path / "a.wav", SOUND, RATE, "PCM_16", endian, "RF64" if container == "RF64" else "WAV")
    content = bytearray(path.read_bytes())
    at = content.index(b"data")
    content[4:8] = content[4:8] if whole == "right" else bytes(4)
    if container == "RF64":
        content[20:44] = bytes(24)
    else:
        content[at + 4:at + 8] = bytes(4)
    assert content[:4] == container.encode()
    path.write_bytes(content)
    assert np.allclose(read_sound(path, RATE), SOUND, atol=1e-4) and sound_seconds(path) == 1
    path.write_bytes(content[:at + 8] + b"LIST" + bytes(4))
    assert "no sound" in refused(path)


@pytest.mark.parametrize("container, subtype", [("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "ULAW"),
                                                ("CAF", "PCM_24"), ("W64", "PCM_16"), ("W64", "FLOAT"),
                                                ("WAV", "PCM_16")])
def test_the_end_is_missed_in_every_container(tmp_path, container, subtype):
    soundfile.write(path := tmp_path / "a", SOUND, RATE, subtype, "BIG" if container == "WAV" else "FILE", container)
    content = path.read_bytes()
    assert len(read_sound(path, RATE)) == RATE
    for length in (len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        assert "cut short" in refused(path)


def test_an_mp3_that_does_not_know_its_length(tmp_path):
    "Without a count in the first frame, joined, or cut, libsndfile would give a part, without a word."
    content = write(tmp_path / "a.mp3", HUM).read_bytes()
    first, second = content[2], content[2] >> 1 & 1  # kbit/s of MPEG 2, padding
    start = 72 * 1000 * sound_files._mp3_kbits[False][(first >> 4) - 1] // RATE + second
    tag = b"ID3\x03\0\0\0\0\x02\x08" + b"\xff\xf3" * 132  # 264 bytes, which look like frames
    for kept in (content, tag + content, tag + tag + content, bytes(3000) + content, content + b"TAG" + bytes(125)):
        (tmp_path / "a.mp3").write_bytes(kept)
        assert sound_seconds(tmp_path / "a.mp3") == 3 and len(read_sound(tmp_path / "a.mp3", RATE)) == 3 * RATE
    for wrong in (content[start:], content + content, content + tag + content):
        (tmp_path / "a.mp3").write_bytes(wrong)
        assert refused(tmp_path / "a.mp3").endswith(f"ffmpeg -i {tmp_path}/a.mp3 {tmp_path}/a.wav")
    (tmp_path / "a.mp3").write_bytes(content[:len(content) // 2])
    assert "cut short" in refused(tmp_path / "a.mp3")
    (tmp_path / "a.mp3").write_text("<html>404</html>" * 99)
    assert "not a sound" in refused(tmp_path / "a.mp3")


def test_a_streamed_flac_is_refused_with_the_command(tmp_path):
    content = bytearray(write(tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples: unknown
    (tmp_path / "a.flac").write_bytes(content)
    assert refused(tmp_path / "a.flac").endswith(f"ffmpeg -i {tmp_path}/a.flac {tmp_path}/a.wav")


def test_a_large_wav_that_is_cut_is_noticed(tmp_path):
    soundfile.write(tmp_path / "a.rf64", SOUND, RATE, subtype="PCM_16", format="RF64")
    content = (tmp_path / "a.rf64").read_bytes()
    assert len(read_sound(tmp_path / "a.rf64", RATE)) == RATE
    (tmp_path / "a.rf64").write_bytes(content[:-100])
    assert "cut short" in refused(tmp_path / "a.rf64")


@pytest.mark.parametrize("start", [b"\0\0\0\x20ftypM4A \0\0\0\0", b"\xff\xf1\x50\x80\x2e\x7f",
                                   b"\x30\x26\xb2\x75\x8e\x66\xcf"])
def test_what_a_telephone_records_is_refused_with_the_command(tmp_path, start):
    (tmp_path / "my memo.m4a").write_bytes(start + bytes(1000))
    message = refused(tmp_path / "my memo.m4a")
    assert message.endswith(f"ffmpeg -i '{tmp_path}/my memo.m4a' '{tmp_path}/my memo.wav'")
    assert find_sounds(tmp_path) == [tmp_path / "my memo.m4a"]  # so that it is not passed over in silence


# ---- channels

@pytest.mark.parametrize("kind", [LogMel, AudioSetPicture])
def test_nothing_cancels_in_the_loudest_channel(kind):
    background = np.random.default_rng(0).normal(0, 0.01, (4 * RATE, 1)).repeat(8, axis=1)  # all hear the same
    fault = 0.1 * np.sin(np.arange(4 * RATE) * 2 * np.pi * 3000 / RATE)
    for channels in ([1, -1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]):  # in anti-phase; at one microphone
        faulty = background + fault[:, None] * channels
        average, loudest = (kind(mix=mix).load((faulty, RATE)) - kind(mix=mix).load((background, RATE))
                            for mix in ("average", "loudest"))
        assert loudest.max() > average.max() + 0.3
    mono = (SOUND, RATE)
    assert torch.equal(kind(mix="average").load(mono), kind().load(mono)) and kind().mix == "loudest"
    assert sound_processor(json.loads(json.dumps(kind(mix="loudest").config()))) == kind(mix="loudest")
    with pytest.raises(InputError, match="mix"):
        kind(mix="mean")


def test_start_outside_the_sound_is_refused():
    for start in (-0.1, 1.0):
        with pytest.raises(InputError, match="outside the sound of 1 s"):
            read_sound((SOUND, RATE), RATE, start)


def test_find_sounds(tmp_path):
    for name in ("b.wav", "a.FLAC", "sub/c.ogg", ".hidden.wav", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_sounds(tmp_path)] == ["a.FLAC", "b.wav", "sub/c.ogg"]
    for folder in (tmp_path / "nowhere", tmp_path / "d.txt"):
        with pytest.raises(InputError):
            find_sounds(folder)


# ---- pictures

@pytest.mark.parametrize("size, seconds, n_fft", [(128, 4.0, 2048), (64, 4.0, 2048), (256, 4.096, 2048),
                                                  (128, 1.0, 1024)])
def test_equal_to_torchaudio(size, seconds, n_fft):
    processor = LogMel(seconds=seconds, size=size, n_fft=n_fft)
    waveform = torch.from_numpy(np.resize(SOUND, processor.hop * size))
    transforms = load_torchaudio().transforms
    left = (n_fft - processor.hop) // 2
    padded = torch.nn.functional.pad(waveform[None], (left, n_fft - processor.hop - left), mode="reflect")
    power = transforms.MelSpectrogram(RATE, n_fft, hop_length=processor.hop, n_mels=size, center=False,
                                      mel_scale="slaney")
    level = transforms.AmplitudeToDB("power")(power(padded) / (n_fft / 4)**2).clamp_min(-80)
    assert torch.allclose(processor.tensor(waveform), 1 + level.flip(1) / 40, atol=1e-6, rtol=0)


def test_shapes_padding_and_cutting():
    processor = LogMel()
    short = torch.from_numpy(SOUND)
    picture = processor.tensor(short)
    assert picture.shape == (1, 128, 128) and picture.dtype == torch.float32
    assert torch.equal(picture, processor.tensor(torch.cat([short, torch.zeros(3 * RATE)])))
    assert (picture[:, :, 37:] == -1).all()  # 1 s and half a Fourier window: 34.1 columns
    long = torch.from_numpy(np.resize(SOUND, 5 * RATE))
    assert torch.equal(processor.tensor(long), processor.tensor(long[:4 * RATE]))
    batch = torch.stack([long, long.flip(0)])
    assert processor.tensor(batch).shape[0] == 2
    assert torch.allclose(processor.tensor(batch)[1], processor.tensor(batch[1]), atol=1e-6)
    assert processor.picture(picture).shape == (128, 128, 3) and processor.picture(picture).dtype == np.uint8


def test_windows_cover_everything():
    processor = LogMel()
    for duration in (0.1, 4.0, 4.00001, 4.1, 5.9, 6.0, 6.1, 8.0, 61.7):
        starts = processor.windows((np.zeros(round(duration * RATE)), RATE))
        assert starts[0] == 0 and starts[-1] + 4 >= duration - 1 / RATE and len(set(starts)) == len(starts)
        assert max(np.diff(starts), default=0) <= 2 + 1e-9 and (len(starts) == 1 or starts[-1] + 4 <= duration + 1e-9)


def test_statistics_standardise_and_survive_json(tmp_path):
    processor = LogMel(seconds=1.024, size=64)
    path = write(tmp_path / "a.wav", subtype="FLOAT")
    fitted = processor.fitted([path, (SOUND, RATE), torch.from_numpy(SOUND)])
    levels = processor.decibels(torch.from_numpy(SOUND))[:, :63]  # the last column holds nothing but silence
    assert np.allclose(fitted.mean, levels.mean(1), atol=1e-3)
    assert np.allclose(fitted.std, levels.std(1).clamp_min(1), rtol=0.02)
    spread = fitted.tensor(torch.from_numpy(SOUND))[0, :, :63].std(1)[torch.tensor(fitted.std) > 1]
    assert len(spread) > 30 and torch.allclose(spread, torch.tensor(1 / 3), rtol=0.02)
    assert LogMel(**json.loads(json.dumps(fitted.config()))) == fitted
    assert set(processor.fitted([torch.zeros(RATE)]).std) == {1.0}
    with pytest.raises(InputError, match="no sound"):
        processor.fitted([])


def test_the_suggested_length_works():
    with pytest.raises(InputError) as error:
        LogMel(sample_rate=22050)
    assert LogMel(sample_rate=22050, seconds=float(str(error.value).split()[-1])).hop == 689
    for settings in (dict(floor_db=0.0), dict(mean=(0.0,) * 128), dict(mean=(0.0,), std=(1.0,)), dict(seconds=30.0)):
        with pytest.raises(InputError):
            LogMel(**settings)


def test_real_clips(shared):
    clips = find_sounds(shared / "data/urbansound8k/audio/fold1")[:12]
    processor = LogMel()
    fitted = processor.fitted(clips)
    for path in clips:
        waveform = processor.read(path)
        assert abs(len(waveform) / RATE - sound_seconds(path)) < 1e-3 and not sound_files.truncated(path)
        tensor = fitted.tensor(waveform)
        assert tensor.shape == (1, 128, 128) and tensor.isfinite().all() and tensor.abs().max() < 5
