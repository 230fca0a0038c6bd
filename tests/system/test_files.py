"""Files that appear whole or not at all, and what is refused before it is read."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_null.system import files
from lora_null.system.files import beside, read_json, replaced_folder, replacing, require_regular, require_writable


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("length", [1, 200, 255])
def test_names_of_any_legal_length_are_written(tmp_path, length):
    path = tmp_path / ("x" * length)
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
    assert path.read_text() == "new" and names(tmp_path) == [path.name]
    # a character may take four bytes
    wide = tmp_path / ("\U0001f600" * 63)
    with replacing(wide) as temporary:
        temporary.write_text("wide")
    assert wide.read_text() == "wide"


def test_long_names_that_begin_alike_stay_apart(tmp_path):
    one, other = (beside(tmp_path / ("x" * 250 + end), "lock") for end in "ab")
    assert one != other and len(one.name) < 255
    assert beside(tmp_path / "short", "lock") == tmp_path / ".short.lock"


def test_threads_that_write_one_path_do_not_meet(tmp_path):
    path, started, errors = tmp_path / "file", threading.Barrier(8), []

    def write(number):
        try:
            for _ in range(20):
                with replacing(path) as temporary:
                    started.wait(10)
                    temporary.write_text(str(number) * 5000)
        except BaseException as error:
            errors.append(error)
            started.abort()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    text = path.read_text()
    assert len(text) == 5000 and len(set(text)) == 1 and names(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals and locks")
def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    path = tmp_path / "file"
    code = (
        "import os, sys; from pathlib import Path; from lora_null.system.files import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".file.notes.tmp").write_text("mine")
    with replacing(tmp_path / "file.other") as other, replacing(path) as alive:
        other.write_text("other")
        alive.write_text("first")
        with replacing(path) as temporary:
            temporary.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and names(tmp_path) == [".file.notes.tmp", "file", "file.other"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with replacing(tmp_path / "link") as temporary:
        assert temporary.parent.name == "disk"
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "text"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_vast_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "vast", "wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=rf"{name} is a pipe, a device or a socket; expected a JSON file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match=r"vast has 1,099,511,627,776 bytes; expected a JSON file of at most"):
        read_json(tmp_path / "vast")
    with pytest.raises(IsADirectoryError, match="is a folder; expected a thing"):
        require_regular(tmp_path, "a thing")
    for missing in (Path("nothing"), Path("vast") / "below"):
        with pytest.raises(FileNotFoundError, match="no such file; expected a JSON file"):
            read_json(tmp_path / missing)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"r": ' + "9" * 5000 + "}", '{"r": NaN}', '{"r": -Infinity}', '{"r": 1e999}', "{", "\udcff"],
    ids=["deep", "digits", "nan", "infinity", "too large", "cut", "bytes"],
)
def test_json_that_no_writer_makes_is_refused_by_name(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"file is damaged .*expected a JSON object"):
        read_json(tmp_path / "file")
    (tmp_path / "file").write_text(json.dumps({"r": 1.5, "n": 10**400}))
    assert read_json(tmp_path / "file") == {"r": 1.5, "n": 10**400}


def write_folder(path, text, check=lambda: None):
    with replaced_folder(path, check) as new:
        (new / "below").mkdir()
        (new / "below" / "file").write_text(text)


def text_of(path):
    return (path / "below" / "file").read_text()


@pytest.fixture(params=["exchanged", "moved"])
def way(request, monkeypatch):
    """As on Linux, and as on systems that cannot exchange two names."""
    if request.param == "moved":
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)


@pytest.mark.parametrize("length", [1, 255])
def test_a_folder_is_replaced_whole(tmp_path, way, length):
    path = tmp_path / ("x" * length)
    path.mkdir()
    for text in ("old", "new"):
        write_folder(path, text)
        assert text_of(path) == text and names(tmp_path) == [path.name]
    with pytest.raises(KeyboardInterrupt), replaced_folder(path, lambda: None) as new:
        (new / "file").write_text("half")
        raise KeyboardInterrupt
    assert text_of(path) == "new" and names(tmp_path) == [path.name]


def test_a_folder_that_appears_meanwhile_is_asked_about(tmp_path):
    path, calls = tmp_path / "folder", []

    def check():
        calls.append(path.exists())
        if len(calls) == 2:
            write_folder(path, "theirs")
        elif path.exists():
            raise FileExistsError(path)

    with pytest.raises(FileExistsError):
        write_folder(path, "mine", check)
    assert calls == [False, False, True] and text_of(path) == "theirs" and names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_put_back_is_not_deleted(tmp_path, monkeypatch, caplog):
    """The new one cannot take the place, and the old one cannot return to it: the disk has gone read-only, say."""
    path = tmp_path / "folder"
    write_folder(path, "old")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise OSError("gone")
        rename(source, target)

    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="gone"):
        write_folder(path, "new")
    [kept] = tmp_path.iterdir()
    assert text_of(kept) == "old" and str(kept) in caplog.text
    # the next one to write there puts it back first
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(FileExistsError):
        write_folder(path, "new", lambda: (_ for _ in ()).throw(FileExistsError(path)) if path.exists() else None)
    assert text_of(path) == "old" and names(tmp_path) == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux only")
def test_there_is_no_moment_without_a_folder_and_kills_leave_nothing(tmp_path):
    path = tmp_path / "folder"
    code = (
        "import sys; from pathlib import Path; from lora_null.system.files import replaced_folder\n"
        "for number in range(10**9):\n"
        "    with replaced_folder(Path(sys.argv[1]), lambda: None) as new:\n"
        "        (new / 'file').write_text(str(number) * 5000)\n"
        "    print(number, flush=True)"
    )
    rng = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        deadline = time.monotonic() + 0.05 + 0.1 * rng.random()
        while time.monotonic() < deadline:
            assert path.is_dir()
        writer.kill()
        writer.wait()
        writer.stdout.close()
        text = (path / "file").read_text()
        assert len(text) % 5000 == 0 and len(set(text)) >= 1
    write_folder(path, "last")
    assert text_of(path) == "last" and names(tmp_path) == ["folder"]


def test_threads_that_write_one_folder_do_not_meet(tmp_path, way):
    path = tmp_path / "folder"
    write_folder(path, "0")
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda number: _attempt(path, str(number)), range(60)))
    assert any(results) and text_of(path) in map(str, range(60)) and names(tmp_path) == ["folder"]


def _attempt(path, text):
    try:
        write_folder(path, text)
    except OSError:  # where names cannot be exchanged, another writer's folder can come in between
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="needs limits on what a process writes")
@pytest.mark.parametrize("kind", ["python", "safetensors"])
def test_a_full_disk_is_one_message_and_the_old_files_stay(tmp_path, kind):
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "file").write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; import torch; from safetensors.torch import save_file\n"
        "from lora_null.system.files import replaced_folder, replacing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def write(path):\n"
        "    if sys.argv[2] == 'python': path.write_bytes(bytes(5000))\n"
        "    else: save_file({'x': torch.zeros(5000)}, str(path))\n"
        "for block, name in ((replacing(Path(sys.argv[1], 'file')), ''),\n"
        "                    (replaced_folder(Path(sys.argv[1], 'folder'), lambda: None), 'below')):\n"
        "    try:\n"
        "        with block as new: write(new / name)\n"
        "    except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), kind], capture_output=True, text=True, check=True)
    for line, name in zip(done.stdout.splitlines(), ("file", "folder"), strict=True):
        assert re.search(rf"{name} was not written \(.*too large.*\); what was there .* Free some space", line), line
    assert (tmp_path / "file").read_text() == "old" and text_of(tmp_path / "folder") == "old"
    assert names(tmp_path) == ["file", "folder"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new" / "below" / ("x" * 255))
    for path, problem in (("file/below/out", "is a file"), ("new/" + "x" * 256, "has 256 bytes; expected names of")):
        with pytest.raises(OSError, match=f"cannot be written: .*{problem}"):
            require_writable(tmp_path / path)
    assert names(tmp_path) == ["file"]
    if Path("/proc/self").exists():
        with pytest.raises(OSError, match="may not write to /proc"):
            require_writable(Path("/proc/out"))
