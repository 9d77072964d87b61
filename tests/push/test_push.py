"""`push` to a hub on loopback through HfApi itself, and what a download of it is worth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.push.conftest import CARD, Loftq
from tests.push.writable_hub import TOKEN, WritableHub

ID = "me/a-model"
REPORT = "loftq_report.json"
README = "README.md"
ADAPTER = "loftq_init/adapter_config.json"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def front_matter(readme: bytes) -> dict[str, Any]:
    _, text, _ = readme.decode().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def pushed(loftq: Loftq, directory: Path, *options: object) -> dict[str, Any]:
    done = loftq("push", directory, ID, "--json", *options)
    assert done.code == 0, done.err
    assert TOKEN not in done.out + done.err
    assert f"{REPORT} there names places of this machine: {directory.anchor}" in done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def downloaded(place: Path) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(ID, local_dir=place))


def test_what_is_downloaded_is_what_was_written_and_verifies(
    hub: WritableHub, loftq: Loftq, written: Path, tmp_path: Path
) -> None:
    before = contents(written)
    (written / "notes.txt").write_text("to myself")
    document = pushed(loftq, written)
    (written / "notes.txt").unlink()
    assert contents(written) == before
    results = document["results"]
    there = hub.contents(ID)
    assert there.keys() == before.keys() | {".gitattributes"}
    changed = {name for name, content in before.items() if there[name] != content}
    assert changed == {README, ADAPTER, REPORT}
    assert json.loads(there[ADAPTER]) == {
        **json.loads(before[ADAPTER]),
        "base_model_name_or_path": ID,
    }
    assert results["repository"] == ID
    assert results["url"] == f"{hub.endpoint}/{ID}"
    assert not results["private"]
    assert results["commit"] == hub.repositories[ID].head
    assert {each["name"]: each["sha256"] for each in results["files"]} == {
        name: sha256(there[name]).hexdigest() for name in before
    }
    assert results["bytes"] == sum(len(there[name]) for name in before)

    place = downloaded(tmp_path / "download")
    done = loftq("verify", place, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["results"]["summary"]["passed"] == 7
    # The report that came with it proves the card too.
    (place / README).write_text("another")
    assert loftq("verify", place).code == 3


def test_a_download_can_be_pushed_and_exported_on(
    hub: WritableHub, loftq: Loftq, originals: Path, tmp_path: Path
) -> None:
    done = loftq("quantize", "-m", originals / "source", "-o", tmp_path / "packed",
                 "--container", "gptq", "--rank", 4, "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    pushed(loftq, tmp_path / "packed")
    assert {"gptq", "4-bit"} <= set(front_matter(hub.contents(ID)[README])["tags"])
    place = downloaded(tmp_path / "download")
    assert loftq("push", place, "me/another").code == 0
    there = hub.contents("me/another")
    assert json.loads(there[ADAPTER])["base_model_name_or_path"] == "me/another"
    assert b'here = "me/another"' in there[README]
    exported = tmp_path / "exported"
    assert loftq("export", place, "--container", "compressed-tensors", "-o", exported).code == 0
    assert json.loads((exported / ADAPTER).read_text())["base_model_name_or_path"] == "exported"
    assert 'Path("exported").resolve()' in (exported / README).read_text()
    assert loftq("verify", exported).code == 0


def test_a_merged_model_that_was_quantized_again(
    hub: WritableHub, loftq: Loftq, originals: Path, tmp_path: Path
) -> None:
    """It has no adapter, and its card speaks of none."""
    small = tmp_path / "small"
    assert loftq("merge", originals / "out", "--requantize", "-o", small).code == 0
    pushed(loftq, small)
    there = hub.contents(ID)
    assert ADAPTER not in there
    assert front_matter(there[README])["tags"] == ["loftq", "bitsandbytes", "4-bit"]
    assert f'here = "{ID}"\nmodel = ' in there[README].decode()
    assert b"PeftModel" not in there[README]
    assert loftq("verify", downloaded(tmp_path / "download")).code == 0


def test_the_card_has_what_the_hub_shows(hub: WritableHub, loftq: Loftq, written: Path) -> None:
    assert pushed(loftq, written)["warnings"] == []
    readme = hub.contents(ID)[README]
    assert front_matter(readme) == {
        "license": "other",
        "license_name": "a-licence",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["loftq", "lora", "peft", "bitsandbytes", "4-bit"],
    }
    text = readme.decode()
    assert f'here = "{ID}"\n' in text
    assert f"hf download {ID} --local-dir a-model\nloftq verify a-model\n" in text
    assert "Path(" not in text
    assert "\n# a-model\n" in text


@pytest.mark.parametrize(
    ("card", "named"),
    [
        (None, ""),
        ("# no metadata", "its card names none"),
        ("---\nlicense: [\n---\n", "while parsing"),
        ("---\nlicense: 3\n---\n", "its card names none"),
        (CARD, None),
    ],
)
def test_a_hubs_original_is_named_with_its_licence(
    card: str | None,
    named: str | None,
    hub: WritableHub,
    loftq: Loftq,
    written: Path,
) -> None:
    commit = hub.commit_of("org/original")
    edit(written, lambda report: report.update(
        model={"id": "org/original", "revision": commit, "source": "hub"}
    ))  # fmt: skip
    if card is not None:
        hub.files["org/original/README.md"] = file_of(card)
    warnings = pushed(loftq, written)["warnings"]
    found = front_matter(hub.contents(ID)[README])
    assert found["base_model"] == "org/original"
    assert found["base_model_relation"] == "quantized"
    assert ("license" in found) == (named is None)
    if named is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert named in warning
        assert "licence" in warning


def test_private_is_private_and_stays_so(hub: WritableHub, loftq: Loftq, written: Path) -> None:
    assert pushed(loftq, written, "--private")["results"]["private"]
    assert hub.repositories[ID].private
    assert pushed(loftq, written)["results"]["private"]  # nothing is made public either


def test_what_is_public_is_no_place_for_what_is_to_be_private(
    hub: WritableHub, loftq: Loftq, written: Path
) -> None:
    hub.create(ID)
    done = loftq("push", written, ID, "--private")
    assert done.code == 1
    assert "is public, and --private was asked for" in done.err
    assert hub.contents(ID).keys() == {".gitattributes"}
    assert hub.blobs == {}


def test_an_interrupted_push_goes_on(hub: WritableHub, loftq: Loftq, written: Path) -> None:
    hub.puts_left = 2
    done = loftq("push", written, ID)
    assert done.code == 1
    assert f"could not push to '{ID}'" in done.err
    assert "run it again" in done.err
    assert hub.contents(ID).keys() == {".gitattributes"}, "what is not whole is not to be seen"
    assert len(hub.arrived) == 2
    hub.puts_left = None
    first = pushed(loftq, written)["results"]
    large = [name for name in contents(written) if name.endswith(".safetensors")]
    assert len(hub.arrived) == len(set(hub.arrived)) == len(large) > 2
    # And once more: nothing is sent, and there is no other commit.
    second = pushed(loftq, written)["results"]
    assert len(hub.arrived) == len(large)
    assert (second["commit"], second["files"]) == (first["commit"], first["files"])


def test_another_output_is_replaced_with_force_only(
    hub: WritableHub, loftq: Loftq, written: Path, originals: Path, tmp_path: Path
) -> None:
    pushed(loftq, written)
    before = hub.contents(ID)
    hub.write(ID, {"notes.txt": b"by hand"})
    other = tmp_path / "other"
    done = loftq("quantize", "-m", originals / "source", "-o", other, "--init", "qlora")
    assert done.code == 0, done.err
    done = loftq("push", other, ID)
    assert done.code == 1
    assert "of another run" in done.err
    assert hub.contents(ID) == {**before, "notes.txt": b"by hand"}
    results = pushed(loftq, other, "--force")["results"]
    now = hub.contents(ID)
    assert now.keys() == contents(other).keys() | {".gitattributes", "notes.txt"}
    assert now["notes.txt"] == b"by hand"
    # A file of the one before, which a loader would find, is gone.
    assert set(results["deleted"]) == before.keys() - now.keys() != set()
    # The same run needs no force, whatever else is there.
    assert pushed(loftq, other)["results"]["deleted"] == []


def test_what_others_wrote_is_not_written_to(hub: WritableHub, loftq: Loftq, written: Path) -> None:
    hub.create(ID)
    hub.write(ID, {"config.json": b"{}", "model.bin": b"weights"})
    done = loftq("push", written, ID)
    assert done.code == 1
    assert "config.json and model.bin" in done.err
    assert "--force" in done.err
    assert hub.blobs == {}
    results = pushed(loftq, written, "--force")["results"]
    assert results["deleted"] == []
    assert hub.contents(ID)["model.bin"] == b"weights"


@pytest.mark.parametrize("what", ["changed", "longer", "missing", "outside", "unlisted"])
def test_nothing_is_sent_of_what_is_not_as_it_was_written(
    what: str, hub: WritableHub, loftq: Loftq, written: Path
) -> None:
    weights = sorted(written.glob("model*.safetensors"))[-1]
    content = bytearray(weights.read_bytes())
    if what == "changed":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif what == "longer":
        weights.write_bytes(content + b"\0")
    elif what == "missing":
        weights.unlink()
    elif what == "outside":
        edit(written, lambda report: report["results"]["files"].append(
            {"name": "../secret", "bytes": 6, "sha256": sha256(b"secret").hexdigest()}
        ))  # fmt: skip
        (written.parent / "secret").write_bytes(b"secret")
    else:
        edit(written, lambda report: report["results"].update(files=[]))
    done = loftq("push", written, ID)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err
    assert hub.requests == [], "the hub is not even asked"


def test_a_readme_that_people_wrote_into_stays_theirs(
    hub: WritableHub, loftq: Loftq, written: Path
) -> None:
    pushed(loftq, written)
    card = hub.contents(ID)[README]
    (written / README).write_text("Mine.")
    (warning,) = pushed(loftq, written)["warnings"]
    assert "README.md is not the one that was written, and is not sent" in warning
    assert hub.contents(ID)[README] == card
    assert (written / README).read_text() == "Mine."


def test_a_file_that_changes_while_it_is_sent_is_in_no_commit(
    hub: WritableHub, loftq: Loftq, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.engines import hub as engine

    last = sorted(written.glob("model*.safetensors"))[-1]
    stale = engine.Repository.stale

    def then_change(*arguments: Any, **options: Any) -> list[str]:
        last.write_bytes(last.read_bytes()[:-1] + b"\x55")
        return stale(*arguments, **options)

    monkeypatch.setattr(engine.Repository, "stale", then_change)
    done = loftq("push", written, ID)
    assert done.code == 1
    assert f"{last} changed while it was sent" in done.err
    assert hub.contents(ID).keys() == {".gitattributes"}


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(
    hub: WritableHub, loftq: Loftq, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.engines import hub as engine

    stale = engine.Repository.stale

    def then_write(*arguments: Any, **options: Any) -> list[str]:
        found = stale(*arguments, **options)
        hub.write(ID, {"config.json": b"theirs"})
        return found

    monkeypatch.setattr(engine.Repository, "stale", then_write)
    done = loftq("push", written, ID)
    assert done.code == 1
    assert "run it again" in done.err
    assert hub.contents(ID).keys() == {".gitattributes", "config.json"}
    assert hub.contents(ID)["config.json"] == b"theirs"


@pytest.mark.parametrize(
    ("repository", "environment", "code", "said"),
    [
        ("a-model", {}, 2, "no user or organization"),
        ("me/a--model", {}, 2, "no name of a repository"),
        ("a/b/c", {}, 2, "no name of a repository"),
        (ID, {"HF_HUB_OFFLINE": "1"}, 1, "forbids the network"),
        (ID, {"HF_TOKEN": ""}, 1, "hf auth login"),
        (ID, {"HF_TOKEN": "hf_wrong"}, 1, "does not take the token"),
        ("someone-else/a-model", {}, 1, "the token may not write there"),
    ],
)
def test_who_may_not_push_is_told_what_to_do(
    repository: str,
    environment: dict[str, str],
    code: int,
    said: str,
    hub: WritableHub,
    loftq: Loftq,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = loftq("push", written, repository)
    assert done.code == code
    assert said in done.err
    assert "hint: " in done.err
    assert TOKEN not in done.err
    assert "hf_wrong" not in done.err
    assert hub.repositories == {}


def test_a_hub_that_is_not_there(
    hub: WritableHub, loftq: Loftq, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = loftq("push", written, ID)
    assert done.code == 1
    assert f"could not push to '{ID}'" in done.err


def test_metadata_that_the_hub_refuses_stops_it_before_anything_is_sent(
    hub: WritableHub, loftq: Loftq, written: Path
) -> None:
    edit(written, lambda report: report.update(
        model={"id": "org/original", "revision": None, "source": "hub"}
    ))  # fmt: skip
    hub.files["org/original/README.md"] = file_of("---\nlicense: My Own\n---\n")
    done = loftq("push", written, ID)
    assert done.code == 1
    assert '"license" must be one of the list' in done.err.replace("\\", "")
    assert hub.blobs == {}


def edit(directory: Path, change: Any) -> None:
    report = json.loads((directory / REPORT).read_text())
    change(report)
    (directory / REPORT).write_text(json.dumps(report))


def file_of(text: str) -> Any:
    from tests.models.stand_in_hub import RemoteFile

    return RemoteFile(text.encode())


_LOADED_BY_NAME = """
import torch
{load}
from peft import AutoPeftModelForCausalLM

model.save_pretrained("trained")
again = AutoPeftModelForCausalLM.from_pretrained("trained")
tokens = torch.arange(20)[None]
with torch.no_grad():
    print(torch.equal(model.eval()(tokens).logits, again.eval()(tokens).logits))
print(model.peft_config["default"].base_model_name_or_path)
print(sum("lora_B" in name for name, _ in model.named_parameters()) > 0)
{head}
print(type(classifier.get_base_model()).__name__)
"""


def test_the_lines_of_the_card_load_it_by_its_name(
    hub: WritableHub, loftq: Loftq, written: Path, tmp_path: Path
) -> None:
    """In a process of its own, whose working directory has nothing of it."""
    pushed(loftq, written)
    readme = hub.contents(ID)[README].decode()
    load, *others = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    head = next(each for each in others if "AutoModelForSequenceClassification" in each)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _LOADED_BY_NAME.format(load=load, head=head)],
        cwd=tmp_path / "empty",
        env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", ID, "True", "LlamaForSequenceClassification"]


class TestQuantize:
    OPTIONS = ("quantize", "--rank", 4, "--iterations", 1, "--target-modules", "c_attn")

    def test_pushes_what_is_complete_and_proved(
        self, hub: WritableHub, loftq: Loftq, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        push = ("--push-to-hub", ID, "--private")
        done = loftq(*self.OPTIONS, "-o", out, "--verify", *push, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["schema"] == "loftq/quantize"
        assert f"pushed to {hub.endpoint}/{ID}, commit {hub.repositories[ID].head}" in done.err
        assert hub.repositories[ID].private
        assert front_matter(hub.contents(ID)[README])["license"] == "apache-2.0"
        # The same line does again what failed there, without quantizing again.
        before, report = hub.arrived.copy(), hub.contents(ID)[REPORT]
        hub.write(ID, {"config.json": b"{}"})
        done = loftq(*self.OPTIONS, "-o", out, "--resume", *push)
        assert done.code == 0, done.err
        assert hub.contents(ID)["config.json"] == (out / "config.json").read_bytes()
        assert hub.contents(ID)[REPORT] == report
        assert hub.arrived == before

    def test_does_not_push_what_does_not_verify(
        self, hub: WritableHub, loftq: Loftq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from loftq_cli.engines import job

        make = job.make_directory

        def spoilt(*arguments: Any) -> Any:
            made = make(*arguments)
            (tmp_path / "out" / "stray.bin").write_bytes(b"")
            return made

        monkeypatch.setattr(job, "make_directory", spoilt)
        done = loftq(*self.OPTIONS, "-o", tmp_path / "out", "--verify", "--push-to-hub", ID)
        assert done.code == 3
        assert hub.repositories == {}

    @pytest.mark.parametrize(
        ("options", "code", "said"),
        [
            (["--private"], 2, "--private is for --push-to-hub"),
            (["--push-to-hub", "a-model"], 2, "no user or organization"),
            (["--push-to-hub", ID, "--dry-run"], 2, "--dry-run writes nothing"),
        ],
    )
    def test_what_cannot_be_pushed_is_said_before_the_work(
        self,
        options: list[str],
        code: int,
        said: str,
        hub: WritableHub,
        loftq: Loftq,
        tmp_path: Path,
    ) -> None:
        done = loftq(*self.OPTIONS, "-o", tmp_path / "out", *options)
        assert done.code == code
        assert said in done.err
        assert not (tmp_path / "out").exists()

    def test_who_is_not_logged_in_is_told_before_the_work(
        self, hub: WritableHub, loftq: Loftq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "")
        done = loftq(*self.OPTIONS, "-o", tmp_path / "out", "--push-to-hub", ID)
        assert done.code == 1
        assert "hf auth login" in done.err
        assert not (tmp_path / "out").exists()
