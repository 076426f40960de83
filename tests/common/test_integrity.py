"""Checksums: known values, and every kind of damage found."""

import io
import json
from pathlib import Path

import pytest

from common.integrity import MANIFEST, CheckedWriter, FileRecord, find_damage, record_of
from common.integrity import write_manifest as write

# The check value of CRC-32: of the digits 1 to 9 (ITU-T V.42).
DIGITS, DIGITS_CRC = b"123456789", 0xCBF43926


def test_known_value(tmp_path: Path) -> None:
    path = tmp_path / "digits"
    path.write_bytes(DIGITS)
    assert record_of(path) == FileRecord(9, DIGITS_CRC)
    writer = CheckedWriter(io.BytesIO())
    writer.write(DIGITS[:4])
    writer.write(memoryview(DIGITS)[4:])
    assert writer.record == FileRecord(9, DIGITS_CRC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "digits").write_bytes(DIGITS)
    (tmp_path / "empty").write_bytes(b"")
    assert write(tmp_path, {}) == 9
    return tmp_path


def test_a_whole_folder(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files == {
        "deep/er/digits": {"size": 9, "crc32": DIGITS_CRC},
        "empty": {"size": 0, "crc32": 0},
    }
    assert find_damage(folder) is None


def test_records_taken_while_writing_are_believed(folder: Path) -> None:
    """The file is not read again: a wrong record shows as damage later."""
    (folder / MANIFEST).unlink()
    write(folder, {"deep/er/digits": FileRecord(9, 1)})
    assert find_damage(folder) == "deep/er/digits: its checksum differs"


def test_every_flipped_bit_is_found(folder: Path) -> None:
    path = folder / "deep" / "er" / "digits"
    for bit in range(8 * len(DIGITS)):
        content = bytearray(DIGITS)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert find_damage(folder) == "deep/er/digits: its checksum differs"


def test_truncated_missing_and_unreadable(folder: Path) -> None:
    path = folder / "deep" / "er" / "digits"
    path.write_bytes(DIGITS[:-1])
    assert find_damage(folder) == "deep/er/digits has 8 bytes instead of 9"
    path.unlink()
    assert find_damage(folder) == "deep/er/digits is missing"


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"a": {"size": 1}}}', ""])
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert "manifest.json is damaged" in str(find_damage(folder))
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == "manifest.json is missing"
