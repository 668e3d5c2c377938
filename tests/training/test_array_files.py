"""Files of arrays: compressed ones are smaller and read the same, older ones are read, and damage is named."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from training.data.array_files import DamagedFileError, names_in, read_arrays, read_header, write_arrays

ARRAYS = {
    "few": np.array([[3, -1, 2]], dtype=np.int16),
    "smooth": np.linspace(-1, 1, 4096, dtype=np.float16).reshape(8, 8, 8, 8).repeat(4, axis=0),
    "none": np.zeros((0, 3), dtype=np.int16),
    "flags": np.arange(300) % 3 == 0,
}


def assert_same(arrays: dict, path) -> None:
    for name, read in zip(arrays, read_arrays(path, *arrays), strict=True):
        assert read.dtype == arrays[name].dtype and np.array_equal(read, arrays[name]) and read.flags.writeable


def test_compressed_arrays_are_smaller_and_read_the_same(tmp_path):
    plain, small = tmp_path / "plain.safetensors", tmp_path / "small.safetensors"
    checksums = (
        write_arrays(plain, ARRAYS, {"by": "test"}),
        write_arrays(small, ARRAYS, {"by": "test"}, ("smooth", "none")),
    )
    assert checksums[0] == checksums[1] and small.stat().st_size < 0.5 * plain.stat().st_size
    for path in (plain, small):
        assert_same(ARRAYS, path)
        header = read_header(path)
        assert header.about == {"by": "test"} and header.arrays["smooth"] == ("f2", [32, 8, 8, 8])
        assert set(names_in(path)) == set(ARRAYS)
    assert set(load_file(small)) == set(ARRAYS)  # it is a safetensors file


def test_part_of_a_file_is_read_and_its_size_is_checked(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    for first in (1, 700, 10**6):
        if first == 1:
            with pytest.raises(DamagedFileError, match="its header is cut off"):
                read_arrays(path, "few", first=first)
        else:
            assert np.array_equal(read_arrays(path, "few", first=first)[0], ARRAYS["few"])
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(DamagedFileError, match="its size is not that of its arrays"):
        read_arrays(path, "few", first=700)


def test_files_without_checksums_are_read(tmp_path):
    save_file(ARRAYS, tmp_path / "old.safetensors")
    assert_same(ARRAYS, tmp_path / "old.safetensors")
    assert read_header(tmp_path / "old.safetensors").checksums == {}


def test_every_flipped_bit_is_an_error_of_one_line_or_does_not_matter(tmp_path):
    """Flips are in the header, in plain and in compressed arrays."""
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    write_arrays(path, ARRAYS, {"by": "test"}, ("smooth",))
    good, found = path.read_bytes(), 0
    for place in [*range(0, 900, 7), *rng.integers(len(good), size=200).tolist()]:
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        try:
            read_arrays(path, *ARRAYS)
        except DamagedFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:  # a flip in the name of a checksum, or in what the maker says
            assert place < 8 + int.from_bytes(good[:8], "little")
    assert found > 200


def test_a_missing_array_or_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    with pytest.raises(DamagedFileError, match="it has no array 'other'"):
        read_arrays(path, "other")
    with pytest.raises(FileNotFoundError, match=r"missing file .*b\.safetensors"):
        read_arrays(tmp_path / "b.safetensors", "few")
    path.write_bytes(json.dumps({}).encode())
    with pytest.raises(DamagedFileError):
        names_in(path)
