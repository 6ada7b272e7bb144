"""What there is of Neuron: stubs, packages without a driver, devices; precisions and compiler arguments."""

import os
import re
import sys
from pathlib import Path

import neuron_double
import pytest
import tomllib
from packaging.requirements import Requirement

import neuron_xtts
from neuron_xtts import NeuronMissingError, Precision
from neuron_xtts.backends.neuron import device
from neuron_xtts.precision import NEURON_PRECISIONS, has_small_kernel_defect
from neuron_xtts.tools.cli import main


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A machine to furnish: ``site`` is on the path, ``root`` is its file system."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(device, "ROOT", tmp_path / "root")
    for name in ("NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    neuron_double.forget()


def problems():
    found = device.find_neuron()
    return list(found.package_problems()), list(found.device_problems())


def test_nothing(host):
    found = device.find_neuron()
    assert (found.versions, found.driver, found.devices, found.instance, found.target) == ({}, False, 0, None, None)
    packages, devices = problems()
    assert [text.partition(":")[0] for text in packages] == [
        "torch-neuronx is not installed",
        "neuronx-cc is not installed",
    ]
    assert "pip.repos.neuron.amazonaws.com" in packages[0]
    assert devices[0].startswith("Neuron's driver is not loaded")


def test_the_stubs_of_pypi(host, xtts):
    neuron_double.install(host / "site", torch_neuronx="1.0", neuronx_cc="1.0.post1", libneuronxla="1.0")
    neuron_double.machine(host / "root")
    packages, devices = problems()
    assert devices == []
    assert packages[0].startswith("torch-neuronx 1.0 is the empty package of that name on PyPI, not AWS's")
    assert packages[1].startswith("neuronx-cc 1.0.post1 is the empty package")
    with pytest.raises(NeuronMissingError, match="the empty package of that name on PyPI"):
        neuron_xtts.patch(xtts, backend="neuron")
    assert not neuron_xtts.is_patched(xtts)
    neuron_xtts.patch(xtts)
    assert neuron_xtts.report(xtts).backend == "cpu"


def test_packages_that_are_too_old(host):
    neuron_double.install(host / "site", torch_neuronx="2.7.0.2.9.9357", neuronx_cc="2.20.9961.0")
    packages, _ = problems()
    assert packages[0].startswith("torch-neuronx 2.7.0.2.9.9357 is too old, 2.8 is needed")
    assert packages[1].startswith("neuronx-cc 2.20.9961.0 is too old, 2.21 is needed")


def test_native_torchneuron(host, xtts):
    """What an unpinned install fetches since SDK 2.33 has the same name."""
    neuron_double.install(host / "site", torch_neuronx="2.14.3.0.2.33.1234", neuronx_cc="2.28.7631.0")
    neuron_double.machine(host / "root")
    (problem,), _ = problems()
    assert problem.startswith(
        "torch-neuronx 2.14.3.0.2.33.1234 is native TorchNeuron, which has no torch_neuronx.trace"
    )
    assert problem.endswith("torch-neuronx==2.9.0.2.15.32035 neuronx-cc==2.26.6360.0")
    with pytest.raises(NeuronMissingError, match="native TorchNeuron"):
        neuron_xtts.compile(xtts, backend="neuron")
    with pytest.raises(NeuronMissingError, match="native TorchNeuron"):
        neuron_xtts.patch(xtts, backend="neuron")


def test_a_compiler_that_refuses_everything(host, xtts):
    """AWS's own page installs it. What is compiled already runs."""
    neuron_double.install(host / "site", neuronx_cc="2.27.5334.0", islpy="2026.2.1")
    neuron_double.machine(host / "root")
    remedy = r"neuronx-cc 2\.27\.5334\.0 fails with islpy 2026\.2\.1 .*: pip install islpy==2026\.1$"
    with pytest.raises(NeuronMissingError, match=remedy):
        neuron_xtts.compile(xtts, backend="neuron")
    with pytest.raises(NeuronMissingError, match=remedy):
        neuron_xtts.compile(xtts)  # "auto" is no wish to stay on the host
    assert problems() == ([], [])


@pytest.mark.parametrize(
    ("compiler", "islpy", "fits"),
    [("2.27.5334.0", "2026.1", True), ("2.27.5334.0", "2026.1.0", True), ("2.27.5334.0", "2026.1.post1", True),
     ("2.27.5334.0", "2026.1.2", False), ("2.27rc1", "2026.2", False), ("2.28.7631.0", "2026.2", False),
     ("2.26.6360.0", "2026.2.1", True), ("2.27.5334.0", None, True)],
)  # fmt: skip
def test_the_solver_that_a_compiler_needs(host, compiler, islpy, fits):
    neuron_double.install(host / "site", neuronx_cc=compiler, islpy=islpy)
    assert (list(device.find_neuron().compiler_problems()) == []) == fits


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.9.0.2.15.32035", True), ("2.9.0.2.15.32035+abc", True), ("2.10.0rc1", False), ("2.13.3.0", False)],
)
def test_which_torch_neuronx_is_native(host, version, fits):
    neuron_double.install(host / "site", torch_neuronx=version)
    assert (list(device.find_neuron().package_problems()) == []) == fits


def test_where_programs_are_looked_for(monkeypatch):
    """Those of this environment first, wherever it is on PATH; and nowhere else than before without an interpreter."""
    scripts = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"/opt/other{os.pathsep}{scripts}{os.pathsep}/bin")
    assert device.scripts_on_path().split(os.pathsep) == [scripts, "/opt/other", "/bin"]
    monkeypatch.setattr(sys, "executable", "")
    assert device.scripts_on_path() == os.environ["PATH"]


def test_versions_are_said_once():
    """What the error tells people to type is what pyproject.toml and the constraints install."""
    root = Path(__file__).parents[2]
    pins = {f"{package}=={version}" for package, version in device.VERSIONS.items()}
    assert pins <= set((root / "constraints/neuron.txt").read_text().splitlines())
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["neuron"]
    wanted = {requirement.name: requirement.specifier for requirement in map(Requirement, extras)}
    for package, version in device.VERSIONS.items():
        assert wanted[package].contains(version)
        assert not wanted[package].contains("2.28.7631.0")
    assert not wanted["torch-neuronx"].contains("2.14.3.0")


def test_install_lines_are_pinned():
    """None in the project can fetch native TorchNeuron, or whatever compiler is the newest."""
    root = Path(__file__).parents[2]
    files = [root / "README.md", *root.glob("docs/*.md"), *root.rglob("neuron_xtts/**/*.py"), *root.glob("examples/*")]
    # A command may go on in the next line, of a shell or of prose; quotes end it, but those of extras.
    texts = [re.sub(r"\\\n|\n(?!\n)", " ", path.read_text()) for path in files if path.is_file()]
    installs = [found for text in texts for found in re.findall(r"pip install (?:\"\.\[[^\"]*\"|[^`\")\n])*", text)]
    assert len([install for install in installs if "neuronx-cc==" in install]) > 1
    for install in installs:
        assert not re.search(r"(?<![\w/-])(torch-neuronx|neuronx-cc)(?!==|[\w-])", install), install


def test_packages_without_a_driver(host, xtts):
    """A build machine: it can compile for a target that is named, and run nothing."""
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root", instance="c6i.4xlarge", driver=False)
    assert problems()[0] == []
    with pytest.raises(NeuronMissingError, match=r"driver is not loaded .* elsewhere graphs can be compiled, not run"):
        neuron_xtts.patch(xtts, backend="neuron")
    neuron_xtts.patch(xtts)
    assert neuron_xtts.report(xtts).backend == "cpu"
    with pytest.raises(NeuronMissingError, match=r"c6i\.4xlarge.*compile\(model, target='inf2'\)"):
        neuron_xtts.compile(xtts)
    with pytest.raises(ValueError, match="target='inf9' does not exist; choose one of 'inf2', 'trn1'"):
        neuron_xtts.compile(xtts, target="inf9")


def test_a_device_on_an_unknown_instance(host, xtts, caplog):
    """A container may hide its instance's type: "auto" says so and stays on the host."""
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root", instance="")
    neuron_xtts.patch(xtts)
    assert neuron_xtts.report(xtts).backend == "cpu"
    assert "Neuron cannot be used, graphs run on the host: this machine (of unknown type)" in caplog.text
    with pytest.raises(NeuronMissingError, match="NEURON_PLATFORM_TARGET_OVERRIDE=inf2"):
        neuron_xtts.patch(xtts, backend="neuron")


def test_a_driver_without_devices(host):
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root", devices=0)
    assert problems() == (
        [],
        ["Neuron's driver is loaded, but there is no /dev/neuron*: is the device passed to this container?"],
    )


@pytest.mark.parametrize(
    ("instance", "devices", "target", "cores"),
    [("inf2.xlarge", 1, "inf2", 2), ("inf2.24xlarge", 6, "inf2", 12), ("trn1.2xlarge", 1, "trn1", 2),
     ("trn1n.32xlarge", 16, "trn1n", 32), ("trn2.48xlarge", 16, "trn2", 64), ("g5.xlarge", 0, None, 0)],
)  # fmt: skip
def test_instances(host, instance, devices, target, cores):
    neuron_double.machine(host / "root", instance=instance, devices=devices, driver=devices > 0)
    found = device.find_neuron()
    assert (found.instance, found.target, found.cores) == (instance, target, cores)


@pytest.mark.parametrize(
    ("variables", "cores"),
    [({"NEURON_RT_VISIBLE_CORES": "0"}, 1), ({"NEURON_RT_VISIBLE_CORES": "1-3"}, 3), ({"NEURON_RT_NUM_CORES": "2"}, 2),
     ({"NEURON_RT_NUM_CORES": "0"}, 12), ({"NEURON_RT_NUM_CORES": "1", "NEURON_RT_VISIBLE_CORES": "2-3"}, 2)],
)  # fmt: skip
def test_visible_cores(host, monkeypatch, variables, cores):
    neuron_double.machine(host / "root", instance="inf2.24xlarge", devices=6)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device.find_neuron().cores == cores


def test_a_named_target(host, monkeypatch):
    neuron_double.machine(host / "root", instance="trn1.2xlarge")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    assert device.find_neuron().target == "inf2"


def test_exact_shapes_cannot_be_compiled(host, xtts):
    neuron_double.install(host / "site")
    with pytest.raises(ValueError, match=r"BucketPlan\.prefill is None, which means exact shapes"):
        neuron_xtts.compile(xtts, target="inf2", buckets=neuron_xtts.BucketPlan(decode=(64,)))


def test_the_host_needs_no_compilation(host, xtts):
    summary = neuron_xtts.compile(xtts)
    assert summary.ok
    assert str(summary) == "The host backend needs no compilation."
    with pytest.raises(NeuronMissingError, match="torch-neuronx is not installed"):
        neuron_xtts.compile(xtts, backend="neuron")


@pytest.fixture
def doctor(host, capsys, monkeypatch):
    """The doctor's exit status, what it prints, and its verdict, which ends that."""
    pytest.importorskip("torch_xla")  # which torch-neuronx brings
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(host / "root"))

    def ask(*options):
        status = main(["doctor", "--store", str(host / "store"), *options])
        out = capsys.readouterr().out
        return status, out, out.rpartition("\n\n")[2]

    return ask


UNTRIED = "was not tried; neuron-xtts doctor --canary tries it.\n"


def test_a_verdict_without_the_canary(host, doctor):
    """It claims nothing that was not tried, and says how to try it."""
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root")
    status, out, verdict = doctor()
    assert (status, verdict) == (0, f"Nothing is known to be wrong. Whether graphs compile and run here {UNTRIED}")
    assert "no problems found" in out
    neuron_double.machine(host / "root", driver=False)
    status, _, verdict = doctor()
    assert status == 1
    assert verdict.startswith("Graphs cannot be run here: Neuron's driver is not loaded ")
    assert verdict.endswith(f". Whether graphs can be compiled {UNTRIED}")


def test_verdicts_of_what_is_known_to_fail(host, doctor):
    """With the remedy; there is no use in the canary then."""
    neuron_double.machine(host / "root")
    neuron_double.install(host / "site", neuronx_cc="2.27.5334.0", islpy="2026.2.1")
    status, out, verdict = doctor("--canary")
    assert status == 1
    assert verdict.startswith("Not ready: neuronx-cc 2.27.5334.0 fails with islpy 2026.2.1 ")
    assert verdict.endswith(": pip install islpy==2026.1.\n")
    assert "The canary" not in out
    neuron_double.install(host / "site", torch_neuronx="1.0", neuronx_cc="1.0.post1")
    _, _, verdict = doctor("--canary")
    assert verdict.startswith("Not ready: torch-neuronx 1.0 is the empty package of that name on PyPI")
    assert verdict.endswith(" And 1 more: see the problems above.\n")
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root", instance="")
    status, _, verdict = doctor("--canary")
    assert status == 1
    assert verdict.startswith("Not ready: this machine (of unknown type) is no Neuron instance that is known, so the ")
    assert verdict.endswith("NEURON_PLATFORM_TARGET_OVERRIDE=inf2.\n")


@pytest.mark.slow
def test_ready(host, doctor):
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root")
    status, out, verdict = doctor("--canary")
    assert status == 0
    assert verdict == (
        "Ready: a small graph was compiled for inf2, ran on one of the 2 NeuronCores that this process may use, and "
        "computed what the host does.\n"
    )
    assert "The canary, a graph of two small layers, was compiled, ran, and computed what the host does.\n" in out
    assert not (host / "store").exists()


@pytest.mark.slow
def test_ready_to_compile(host, doctor):
    """A build machine."""
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root", instance="c6i.4xlarge", driver=False)
    status, _, verdict = doctor("--canary", "--target", "inf2")
    assert status == 1
    assert verdict.startswith("Graphs can be compiled here, but not run: Neuron's driver is not loaded ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "found", "says"),
    [
        ("busy", 0, "Graphs can be compiled here, but not run: another process has the NeuronCores; end it, or give "
         "each process cores of its own with NEURON_RT_VISIBLE_CORES."),
        ("islpy", 1, "Not ready: a graph of two small layers does not compile (compile: RuntimeError: neuronx-cc "
         "failed with 70): pip install islpy==2026.1."),
        ("nan", 1, "Not ready: a graph of two small layers compiles and runs, but not as on the host (wrong results in "
         "call 1 after the first write of its state: error inf and correlation 0.00000 against the host, where 1.0e-03 "
         "and 0.9999 are the limits): please report it, with the log and what neuron-xtts doctor prints."),
    ],
)  # fmt: skip
def test_verdicts_of_the_canary(host, doctor, monkeypatch, fault, found, says):
    neuron_double.install(host / "site")
    neuron_double.machine(host / "root")
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", f"{fault}:canary")
    status, out, verdict = doctor("--canary")
    assert (status, verdict) == (found, f"{says}\n")
    logs = [line.removeprefix("log: ") for line in out.splitlines() if line.startswith("log: ")]
    assert [Path(log).is_file() for log in logs] == [True] * found


ARGUMENTS = {
    ("fp32", "decode", "inf2", "2.26.6360.0"): "--target=inf2 --model-type=transformer --auto-cast=none",
    ("fp32", "vocoder", "inf2", "2.26.6360.0"): "--target=inf2 --model-type=generic --auto-cast=none --optlevel=1",
    ("fp32", "vocoder", "trn1", "2.26.6360.0"): "--target=trn1 --model-type=generic --auto-cast=none",
    ("bf16", "prefill", "inf2", "2.22.12471.0"):
        "--target=inf2 --model-type=transformer --auto-cast=none",
    ("bf16", "vocoder", "trn2", "2.22.12471.0"): "--target=trn2 --model-type=generic --auto-cast=none",
    ("bf16", "conditioning", "inf2", "2.22.12471.0"): "--target=inf2 --model-type=generic --auto-cast=none",
    ("bf16-all", "latents", "inf2", "2.22.12471.0+6f180f47"):
        "--target=inf2 --model-type=transformer --auto-cast=all --auto-cast-type=bf16",
    ("bf16-all", "vocoder", "inf2", "2.22.12471.0"):
        "--target=inf2 --model-type=generic --auto-cast=all --auto-cast-type=bf16 --optlevel=1",
    ("fp32", "decode", "inf2", "2.27.5334.0"): "--target=inf2 --model-type=transformer --auto-cast=none",
    ("fp32", "decode", "trn2", "2.27.5334.0"):
        "--target=trn2 --model-type=transformer --auto-cast=none --native-int64=disabled "
        "--implicit-integer-downcast=all",
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS, ids=" ".join)
def test_compiler_arguments(case):
    name, *rest = case
    assert " ".join(Precision(name).compiler_arguments(*rest)) == ARGUMENTS[case]


def test_arguments_of_the_user():
    """They come last, where the compiler heeds them, and a cast that they ask for loosens the tolerance."""
    precision = Precision("fp32", {"vocoder": "-O2 --auto-cast=all"})
    assert precision.compiler_arguments("vocoder", "inf2", "2.26")[-2:] == ("-O2", "--auto-cast=all")
    assert precision.compiler_arguments("decode", "inf2", "2.26") == Precision().compiler_arguments(
        "decode", "inf2", "2.26"
    )
    assert precision.tolerance("vocoder", "inf2") == Precision("bf16-all").tolerance("vocoder", "inf2")
    assert precision.tolerance("decode", "inf2") == Precision().tolerance("decode", "inf2")


def test_tolerances_follow_the_casts():
    errors = [Precision(name).tolerance("decode", "inf2").error for name in NEURON_PRECISIONS]
    assert errors == sorted(errors)
    assert Precision("bf16").tolerance("vocoder", "inf2") == Precision("fp32").tolerance("vocoder", "inf2")
    exact, rounded = (Precision(name) for name in ("fp32", "bf16"))
    assert exact.tolerance("decode", "trn2").error > exact.tolerance("decode", "trn1").error
    assert rounded.tolerance("decode", "trn2") == rounded.tolerance("decode", "trn1")


@pytest.mark.parametrize("name", NEURON_PRECISIONS)
def test_what_is_never_cast(name):
    """What only copies must be exact, and what counts must not count in bf16; its weights may be rounded."""
    precision = Precision(name)
    for graph in ("move", "codes"):
        assert "--auto-cast=none" in precision.compiler_arguments(graph, "inf2", "2.26")
    assert precision.tolerance("move", "inf2") == Precision("fp32").tolerance("decode", "inf2")
    assert precision.rounds("codes") == precision.rounds("decode") == (name != "fp32")


def test_bad_precisions(xtts):
    with pytest.raises(ValueError, match="precision 'fp8' does not exist; choose one of 'fp32', 'bf16', 'int8'"):
        Precision("fp8")
    with pytest.raises(ValueError, match="there is no graph 'vocode'; choose one of 'prefill'"):
        Precision("fp32", {"vocode": "-O2"})
    with pytest.raises(TypeError, match="compiler arguments of vocoder must be a string, got a list"):
        Precision("fp32", {"vocoder": ["-O2"]})
    for precision in ("bf16-all", Precision("bf16-all")):
        with pytest.raises(ValueError, match="'bf16-all' does not exist on the host; choose one of 'fp32', 'bf16'"):
            neuron_xtts.patch(xtts, backend="cpu", precision=precision)


@pytest.mark.parametrize(
    ("compiler", "defect"), [("2.22.12471.0", True), ("2.24.8799.0", True), ("2.25.3371.0", False)]
)
def test_which_compilers_have_the_defect(compiler, defect):
    assert has_small_kernel_defect(compiler) == defect
