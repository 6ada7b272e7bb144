"""The store by itself, without torch's modules: keys, manifests, locks, what is set aside and what is pruned."""

import dataclasses
import json
import multiprocessing
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neuron_xtts.backends.neuron.store import MANIFEST, MODEL, Recipe, Store
from neuron_xtts.coqui.weights import Digester, stamp, tensors_of
from neuron_xtts.errors import ArtifactError

RECIPE = Recipe(
    graph="decode", bucket=(1, 64), room=(), source="s",
    inputs=(("embeds", "torch.float32", (1, 1, 64)),), states=4,
    weights="w", precision="fp32", arguments=("--target=inf2",), target="inf2",
    versions={"torch": "2.9.0", "torch-neuronx": "2.9", "neuronx-cc": "2.26"},
)  # fmt: skip
CHANGES = {
    "graph": "prefill", "bucket": (2, 64), "room": (80,), "source": "t",
    "inputs": (("embeds", "torch.float32", (1, 1, 65)),), "states": 5, "weights": "v", "precision": "bf16",
    "arguments": ("--target=inf2", "-O1"), "target": "trn1",
    "versions": {"torch": "2.9.0", "torch-neuronx": "2.9", "neuronx-cc": "2.27"},
}  # fmt: skip


def publish(store, recipe=RECIPE, data=b"a compiled graph"):
    with store.scratch() as scratch:
        (scratch / "artifact").mkdir()
        (scratch / "artifact" / MODEL).write_bytes(data)
        return store.publish(scratch / "artifact", recipe, seconds=1.5)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_the_key_depends_on_everything(field):
    other = dataclasses.replace(RECIPE, **{field: CHANGES[field]})
    assert other.key != RECIPE.key
    assert dataclasses.replace(RECIPE).key == RECIPE.key


words = st.text(string.ascii_letters + "-=1", max_size=8)


@given(st.lists(words, max_size=4), st.lists(words, max_size=4))
def test_different_arguments_have_different_keys(ours, theirs):
    """However they are cut into pieces."""
    a, b = (dataclasses.replace(RECIPE, arguments=tuple(arguments)) for arguments in (ours, theirs))
    assert (a.key == b.key) == (ours == theirs)


def test_publish_and_find(tmp_path):
    store = Store(tmp_path / "new" / "store")
    assert store.find(RECIPE) is None
    assert list(store) == []
    published = publish(store)
    found = store.find(RECIPE)
    assert found.folder == published.folder
    assert found.manifest == published.manifest == json.loads((found.folder / MANIFEST).read_text())
    assert Recipe.parse(found.manifest["recipe"]) == RECIPE
    assert found.manifest["bytes"] == 16
    assert found.manifest["seconds"] == 1.5
    found.check()
    assert [artifact.folder for artifact in store] == [found.folder]
    assert list(store.leftovers()) == []
    assert not list((store.root / "scratch").iterdir())


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_XTTS_CACHE", str(tmp_path / "named"))
    assert Store().root == tmp_path / "named"
    assert Store(tmp_path / "given").root == tmp_path / "given"
    monkeypatch.delenv("NEURON_XTTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().root == tmp_path / "neuron_xtts"
    assert not (tmp_path / "neuron_xtts").exists()


def test_explanations(tmp_path):
    store = Store(tmp_path)
    assert store.explain(RECIPE) == "not compiled"
    publish(store, dataclasses.replace(RECIPE, bucket=(1, 32)))
    assert store.explain(RECIPE) == "not compiled"
    changed = {name: CHANGES[name] for name in ("versions", "weights")}
    publish(store, dataclasses.replace(RECIPE, **changed))
    assert store.explain(RECIPE) == "compiled for something else: weights changed, other versions"
    publish(store, dataclasses.replace(RECIPE, precision="bf16"))
    assert store.explain(RECIPE) == "compiled for something else: another precision"  # the nearest


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 99, "recipe": {}}'])
def test_manifests_that_cannot_be_read(tmp_path, text):
    store = Store(tmp_path)
    artifact = publish(store)
    (artifact.folder / MANIFEST).write_text(text)
    assert store.find(RECIPE) is None
    assert list(store) == []
    assert list(store.leftovers()) == [artifact.folder]
    assert publish(store).folder == artifact.folder  # the broken one makes room
    assert store.find(RECIPE) is not None
    assert len(list(store.leftovers())) == 1


def test_setting_aside(tmp_path):
    store = Store(tmp_path)
    for _ in range(2):
        artifact = publish(store)
        (artifact.folder / MODEL).write_bytes(b"something else")
        with pytest.raises(ArtifactError, match="is corrupt"):
            artifact.check()
        assert store.find(RECIPE) is None
    assert [path.name for path in store.leftovers()] == [artifact.folder.name + ".broken"]


def test_recording(tmp_path):
    store = Store(tmp_path)
    publish(store).record(quarantined="wrong results")
    assert store.find(RECIPE).quarantined == "wrong results"
    assert store.find(RECIPE).manifest["seconds"] == 1.5


def test_scratch_of_the_living_is_no_leftover(tmp_path):
    store = Store(tmp_path)
    with store.scratch():
        assert list(store.leftovers()) == []
    (store.root / "scratch" / "of-a-process-that-died").mkdir()
    assert [path.name for path in store.leftovers()] == ["of-a-process-that-died"]


def hold(root, ready, release):
    with Store(root).lock(RECIPE):
        ready.set()
        release.wait()


def test_the_lock_dies_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(60)
    lock = Store(tmp_path).lock(RECIPE)
    with pytest.raises(TimeoutError):
        lock.acquire(timeout=0.2)
    process.kill()
    process.join()
    with lock.acquire(timeout=10):
        pass


def test_digests():
    """Of values, names, settings and types; not of where they lie."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2))
    digest = Digester().digest(module)
    twin = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2))
    assert Digester().digest(twin) != digest
    twin.load_state_dict(module.state_dict())
    assert Digester().digest(twin) == digest
    twin[1].running_mean += 1  # a buffer
    assert Digester().digest(twin) != digest
    twin.load_state_dict(module.state_dict())
    twin[0] = nn.Conv1d(2, 2, 3, dilation=2)
    twin[0].load_state_dict(module[0].state_dict())
    assert Digester().digest(twin) != digest
    assert Digester().digest(module.double()) != digest


def test_digests_of_settings_on_the_graph_itself():
    """Such as the heads of the conditioning graph, which no weight tells."""
    first, second = nn.Dropout(0.1), nn.Dropout(0.2)
    assert Digester().digest(first) != Digester().digest(second)


def test_shared_weights_are_read_once():
    linear = nn.Linear(8, 8)
    digester = Digester()
    digester.digest(nn.Sequential(linear))
    digester.digest(nn.Sequential(nn.Identity(), linear))
    assert digester.bytes_read == 4 * (64 + 8)
    assert "0 MB of weights read" in str(digester)


def test_stamps():
    module = nn.Linear(3, 3)
    before = stamp(tensors_of(module))
    assert stamp(tensors_of(module)) == before
    with torch.no_grad():
        module.weight[0] = 0
    assert stamp(tensors_of(module)) != before
