"""The double of torch_neuronx: it computes what was lowered, and refuses what the real one refuses."""

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from importlib.metadata import version

import neuron_double
import pytest
import torch
from torch import nn
from torch.nn import functional as F

torch_xla = pytest.importorskip("torch_xla")

TARGET = "--target inf2"


class Cache(nn.Module):
    """Writes a row into each of two states, and reads them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        shapes = ((3, 4), (5, 4))
        self.states = nn.ParameterList(nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in shapes)

    def forward(self, x, position):
        first, second = (state.clone() for state in self.states)
        first.scatter_(0, position.long().view(1, 1).expand(1, 4), x)
        second.add_(self.linear(x))
        return first.sum(0) + second.sum(0), first, second

    def aliases(self):
        return {self.states[1]: 2, self.states[0]: 1}


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def conv(transposed=False, **options):
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    return kind(2, 3, 3, **options).eval()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path in which to install; nothing else of Neuron is around."""
    for name in [name for name in os.environ if name.startswith("NEURON_")]:
        monkeypatch.delenv(name)
    neuron_double.forget()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "site"
    neuron_double.forget()


@pytest.fixture
def root(site, tmp_path, monkeypatch):
    """An inf2.xlarge."""
    neuron_double.machine(tmp_path / "machine")
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(tmp_path / "machine"))
    return tmp_path / "machine"


@pytest.fixture
def host(site):
    """The double on a host without a driver."""
    neuron_double.install(site)
    return importlib.import_module("torch_neuronx")


@pytest.fixture
def neuron(root, host):
    """The double on an inf2.xlarge."""
    return host


@pytest.fixture
def fault(monkeypatch):
    return lambda text: monkeypatch.setenv("NEURON_DOUBLE_FAULT", text)


def fresh(site, **versions):
    """The double with other packages."""
    neuron_double.forget()
    neuron_double.install(site, **versions)
    return importlib.import_module("torch_neuronx")


def compiled(neuron, func, *inputs, arguments=TARGET, **options):
    return neuron.trace(func, inputs, compiler_args=arguments, cpu_backend=True, **options)


def cache(neuron, **options):
    module = Cache()
    inputs = torch.randn(1, 4), torch.tensor([1], dtype=torch.int32)
    return module, compiled(neuron, module, *inputs, input_output_aliases=module.aliases(), **options), inputs


def states(traced):
    return [parameter for name, parameter in traced.named_parameters() if name.startswith("states.")]


def run(script, *arguments, env, check=True):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


# Packages and machines


def test_installed_distributions(site):
    torch_neuronx = fresh(site, torch_neuronx="2.8.0.2.10.16998", neuronx_cc="2.21.33363.0+abc")
    assert torch_neuronx.__version__ == version("torch-neuronx") == "2.8.0.2.10.16998"
    assert importlib.import_module("neuronxcc").__version__ == version("neuronx-cc") == "2.21.33363.0+abc"
    assert importlib.import_module("libneuronxla").__version__ == version("libneuronxla")


def test_stub_is_importable_and_empty(site):
    stub = fresh(site, torch_neuronx="1.0", neuronx_cc="1.0.post1", libneuronxla="1.0")
    assert not hasattr(stub, "trace")
    assert version("torch-neuronx") == "1.0"
    fresh(site)  # in place of the stub
    assert version("torch-neuronx").startswith("2.9")


@pytest.mark.parametrize("missing", ["torch_neuronx", "libneuronxla"])
def test_missing_package(site, missing):
    with pytest.raises(ModuleNotFoundError, match=missing):
        fresh(site, **{missing: None})


@pytest.mark.parametrize("compiler", [None, "1.0.post1"])
def test_missing_compiler(site, root, compiler):
    with pytest.raises(RuntimeError, match="compiler binary does not exist"):
        compiled(fresh(site, neuronx_cc=compiler), Double(), torch.ones(2))


@pytest.mark.parametrize(
    ("machine", "variables", "cores"),
    [
        ({}, {}, [0, 1]),
        ({"instance": "inf2.24xlarge", "devices": 6}, {}, list(range(12))),
        ({}, {"NEURON_RT_VISIBLE_CORES": "0"}, [0]),
        ({}, {"NEURON_RT_VISIBLE_CORES": "1", "NEURON_RT_NUM_CORES": "2"}, [1]),
        ({}, {"NEURON_RT_VISIBLE_CORES": "0-1"}, [0, 1]),
        ({}, {"NEURON_RT_NUM_CORES": "1"}, [0]),
        ({}, {"NEURON_RT_NUM_CORES": "0"}, [0, 1]),
    ],
)
def test_cores(host, tmp_path, monkeypatch, machine, variables, cores):
    neuron_double.machine(tmp_path / "root", **machine)
    for name, value in {"NEURON_DOUBLE_ROOT": str(tmp_path / "root"), **variables}.items():
        monkeypatch.setenv(name, value)
    assert host._machine.runtime.start() == cores


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "1-2"}, "Requested:nc1-nc2 Available:1"),
        ({"NEURON_RT_NUM_CORES": "3"}, "Requested:3 Available:2"),
        ({"NEURON_RT_VISIBLE_CORES": "a"}, "NEURON_RT_VISIBLE_CORES"),
    ],
)
def test_cores_that_are_not_there(neuron, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        neuron._machine.runtime.start()


@pytest.mark.parametrize("machine", [None, {"driver": False}, {"devices": 0}])
def test_no_device(host, tmp_path, monkeypatch, machine):
    if machine:
        neuron_double.machine(tmp_path / "root", **machine)
        monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(tmp_path / "root"))
    with pytest.raises(RuntimeError, match="PyTorch Neuron Runtime could not be initialized"):
        host.trace(Double(), torch.ones(2))
    monkeypatch.setattr(host._machine, "TARGET_OVERRIDE", "inf2")
    traced = compiled(host, Double(), torch.ones(2))
    with pytest.raises(RuntimeError, match="PyTorch Neuron Runtime could not be initialized"):
        traced(torch.ones(2))


# What it computes


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (2, 4)),
        (conv(dilation=5, padding=5), (1, 2, 16)),
        (conv(transposed=True, stride=2), (1, 2, 8)),
        (nn.LSTM(4, 3), (5, 4)),
    ],
)
def test_equal_to_eager(neuron, module, shape):
    func = module if not isinstance(module, nn.LSTM) else lambda x: F.silu(F.layer_norm(x, (4,)))
    traced = neuron.trace(func, torch.randn(shape))
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), func(x), rtol=0, atol=1e-5)
    assert isinstance(traced, torch.jit.ScriptModule)
    assert list(traced.named_parameters()) == []


@pytest.mark.parametrize("structure", [tuple, list])
def test_structure_of_outputs(neuron, structure):
    traced = neuron.trace(lambda x, y: structure([x + y, x, x]), (torch.ones(2), torch.tensor(3.0)))
    outputs = traced(torch.zeros(2), torch.tensor(1.0))
    assert type(outputs) is structure
    torch.testing.assert_close(list(outputs), [torch.ones(2), torch.zeros(2), torch.zeros(2)])
    [single] = neuron.trace(lambda x: structure([x + 1]), torch.ones(2))(torch.zeros(2))
    assert single.tolist() == [1, 1]


def test_integers_and_booleans(neuron):
    inputs = torch.tensor([[1, 2]]), torch.tensor([[0]], dtype=torch.int32), torch.tensor([True, False])
    traced = neuron.trace(lambda x, at, mask: (x.gather(1, at.long()), x.where(mask, 7)), inputs)
    picked, masked = traced(torch.tensor([[5, 6]]), torch.tensor([[1]], dtype=torch.int32), torch.tensor([False, True]))
    assert (picked.tolist(), masked.tolist(), picked.dtype) == ([[6]], [[7, 6]], torch.int64)


def test_python_runs_once(neuron):
    module, calls = nn.Linear(2, 2), []
    before = module.weight.detach().clone(), module.bias.detach().clone()
    module.register_forward_hook(lambda *_: calls.append(1))
    traced = compiled(neuron, module, torch.ones(1, 2))
    with torch.no_grad():
        module.weight.zero_()
    torch.testing.assert_close(traced(torch.ones(1, 2)), F.linear(torch.ones(1, 2), *before))
    traced(torch.ones(1, 2))
    assert len(calls) == 1
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.device.type == "cpu"


def test_module_changing_its_input(neuron):
    def func(x):
        x.add_(1)
        return x * 2

    x = torch.ones(2)
    assert neuron.trace(func, x)(x).tolist() == [4, 4]
    assert x.tolist() == [1, 1]


def test_inference_mode(neuron):
    with torch.inference_mode():
        _, traced, inputs = cache(neuron)
        neuron.move_trace_to_device(traced, 0)
        traced(*inputs)
    traced(*inputs)
    assert states(traced)[0][1].cpu().tolist() == inputs[0][0].tolist()


# Save, load, processes


@pytest.mark.slow
def test_new_process(neuron, tmp_path, site, root):
    module, traced, inputs = cache(neuron)
    torch.jit.save(traced, tmp_path / "model.pt")
    torch.save((inputs, module(*inputs)), tmp_path / "expected.pt")
    script = """
        import os, sys, torch
        try:
            torch.jit.load(sys.argv[1])
        except RuntimeError as error:
            assert "neuron_double" in str(error), error
        else:
            raise AssertionError("loaded without torch_neuronx")
        import torch_neuronx
        traced = torch.jit.load(sys.argv[1])
        inputs, expected = torch.load(sys.argv[2])
        assert [name for name, _ in traced.named_parameters()] == ["states.0", "states.1"]
        torch_neuronx.move_trace_to_device(traced, 0)
        outputs = traced(*inputs)
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.detach(), rtol=0, atol=1e-5)
        if os.fork() == 0:
            try:
                traced(*inputs)
            except RuntimeError as error:
                os._exit("Incompatible runtime state: NRT_STATE_CHILD" not in str(error))
            os._exit(2)
        assert os.wait()[1] == 0
    """
    environment = neuron_double.environment(site, root)
    run(script, tmp_path / "model.pt", tmp_path / "expected.pt", env=environment)

    neuron._machine.runtime.start()  # from here on, this process has all cores
    script = "import torch_neuronx; torch_neuronx._machine.runtime.start()"
    assert "Requested:2 Available:0" in run(script, env=environment, check=False).stderr


def test_imported_twice(site, root):
    neuron = fresh(site)
    traced = compiled(neuron, nn.Linear(2, 2), torch.ones(1, 2))
    expected = traced(torch.ones(1, 2))
    again = fresh(site)
    torch.testing.assert_close(traced(torch.ones(1, 2)), expected)
    assert neuron._runtime.executions == again._runtime.executions == {("", 0): 1}


# Inputs and outputs


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.ones(2)},
        ((torch.ones(2),), {}),
        [torch.ones(2)],
        (torch.ones(2), "text"),
        (torch.ones(2), 1),
        (torch.ones(2), None),
        (),
        None,
    ],
)
def test_refused_structure_of_inputs(neuron, inputs):
    with pytest.raises(TypeError, match="example_inputs"):
        neuron.trace(lambda *x: x[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_refused_dtypes(neuron, dtype):
    with pytest.raises(RuntimeError, match="does not support"):
        neuron.trace(Double(), torch.ones(2, dtype=dtype))


def test_unused_input(neuron):
    message = r"unused. Tensor will be ignored. \(index=1, shape=torch.Size\(\[1, 3\]\), dtype=torch.int32\)"
    with pytest.warns(UserWarning, match=message):
        traced = neuron.trace(lambda x, y: x + y.shape[1], (torch.ones(2), torch.ones(1, 3, dtype=torch.int32)))
    assert traced(torch.zeros(2), torch.ones(1, 3, dtype=torch.int32)).tolist() == [3, 3]


@pytest.mark.parametrize(
    "func",
    [
        lambda x: {"y": x + 1},
        lambda x: (x, (x + 1,)),
        lambda x: (x, None),
        lambda x: (),
        lambda x: None,
    ],
)
def test_refused_structure_of_outputs(neuron, func):
    with pytest.raises(RuntimeError, match="Outputs must be"):
        neuron.trace(func, torch.ones(2))


def test_output_made_on_the_cpu(neuron):
    with pytest.raises(RuntimeError, match="Input tensor is not an XLA tensor: CPUFloatType"):
        neuron.trace(lambda x: (x, torch.ones(2)), torch.ones(2))
    with pytest.raises(RuntimeError, match="Input tensor is not an XLA tensor: CPULongType"):
        neuron.trace(lambda x: (x, torch.ones(2, dtype=torch.long)), torch.ones(2))


@pytest.mark.parametrize("func", [lambda x: x.cpu(), lambda x: (x + 1).cpu().to(x.device)])
def test_fetching_a_value(neuron, func):
    with pytest.raises(RuntimeError, match="fetched to the CPU"):
        neuron.trace(func, torch.ones(2))


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(3), torch.ones(2)),
        (torch.ones(1, 2), torch.ones(2)),
        (torch.ones(2, dtype=torch.int32), torch.ones(2)),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)),
    ],
)
def test_refused_call(neuron, inputs):
    traced = neuron.trace(lambda x, y: x + y, (torch.ones(2), torch.ones(2)))
    with pytest.raises(RuntimeError, match="NRT_INVALID: input"):
        traced(*inputs)


def test_refused_number_of_inputs(neuron):
    traced = neuron.trace(Double(), torch.ones(2))
    for inputs in ((), (torch.ones(2), torch.ones(2))):
        with pytest.raises(RuntimeError, match="argument"):  # in the words of TorchScript
            traced(*inputs)


# Arguments of trace


def test_unknown_keywords(neuron):
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments: \['inline_weights', 'aliases'\]"):
        neuron.trace(Double(), torch.ones(2), inline_weights=True, aliases={})
    with pytest.raises(TypeError, match="positional"):
        neuron.trace(Double(), torch.ones(2), {})
    for options in ({"inline_weights_to_neff": False}, {"partitioner_config": object()}):
        with pytest.raises(NotImplementedError):
            neuron.trace(Double(), torch.ones(2), **options)


def test_cpu_backend(site, monkeypatch):
    host = fresh(site)
    with pytest.raises(RuntimeError, match="supply compiler argument target with one of options trn1, inf2, trn1n"):
        host.trace(Double(), torch.ones(2), cpu_backend=True, compiler_args="--auto-cast none")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")  # too late for this import
    with pytest.raises(RuntimeError, match=r"!\(num_devices > 0\)"):
        compiled(host, Double(), torch.ones(2))
    assert isinstance(compiled(fresh(site), Double(), torch.ones(2)), torch.jit.ScriptModule)


@pytest.mark.parametrize(
    "arguments",
    [
        "--target=inf2 --auto-cast=none -O1 --model-type transformer",
        ["--target", "trn1", "-O", "3", "--auto-cast", "matmult", "--auto-cast-type=bf16", "--verbose", "info"],
        "--target trn2 -lnc 1 --enable-saturate-infinity",
        "--target inf2 --optlevel 2 --target=trn2 --logical-nc-config=2 --disable-mixed-precision-accumulation",
    ],
)
def test_compiler_arguments(neuron, arguments):
    compiled(neuron, Double(), torch.ones(2), arguments=arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "--auto-casts none",
        "--auto-cast some",
        "-O4",
        "--native-int64=disabled",
        "--implicit-integer-downcast=all",
        "-lnc 2",
        "--target trn2 -lnc 1 --target inf2",
        "--target inf3",
        "--optl 1",
        ["--auto-cast none"],
    ],
)
def test_refused_compiler_arguments(neuron, capsys, arguments):
    arguments = arguments if isinstance(arguments, list) else f"--target inf2 {arguments}"
    with pytest.raises(RuntimeError, match=r"neuronx-cc failed with 1$"):
        compiled(neuron, Double(), torch.ones(2), arguments=arguments)
    assert "error: " in capsys.readouterr().err
    with pytest.raises(TypeError):
        compiled(neuron, Double(), torch.ones(2), arguments=("--target", "inf2"))


@pytest.mark.parametrize("flag", ["--native-int64=disabled", "--implicit-integer-downcast all"])
def test_compiler_arguments_of_2_27(site, root, capsys, flag):
    """Documented for trn2, and for what comes after it."""
    neuron = fresh(site, neuronx_cc="2.27.5334.0")
    compiled(neuron, Double(), torch.ones(2), arguments=f"--target trn2 {flag}")
    with pytest.raises(RuntimeError, match=r"neuronx-cc failed with 1$"):
        compiled(neuron, Double(), torch.ones(2), arguments=f"{TARGET} {flag}")
    assert "NCC_EARG001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("compiler", "islpy", "fails"),
    [("2.27.5334.0", "2026.2.1", True), ("2.27.5334.0", "2026.1", False), ("2.26.6360.0", "2026.2.1", False)],
)
def test_the_solver_of_the_compiler(site, root, capsys, compiler, islpy, fails):
    neuron = fresh(site, neuronx_cc=compiler, islpy=islpy)
    with pytest.raises(RuntimeError, match="failed with 70") if fails else contextlib.nullcontext():
        compiled(neuron, Double(), torch.ones(2))
    assert ("[NCC_ISMP902] Simplifier error: is_subset()" in capsys.readouterr().err) == fails


def test_the_import_runs_a_program_of_the_environment(site, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    with pytest.raises(FileNotFoundError, match="libneuronpjrt-path"):
        fresh(site)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_a_custom_call(neuron, approximate):
    with pytest.raises(NotImplementedError, match="AwsNeuronGelu"):
        compiled(neuron, lambda x: F.gelu(x, approximate=approximate), torch.ones(2))


def test_native_torchneuron(site):
    assert not hasattr(fresh(site, torch_neuronx="2.14.3.0.2.33.1234"), "trace")


# The compiler


def dynamic_update_slice(x, at):
    from torch_xla.core import xla_builder

    def build(*parameters):
        target, value, index = parameters
        return target.dynamic_update_slice(value, [index])

    shapes = [(4,), (1,), ()]
    dtypes = [torch.float32, torch.float32, torch.int32]
    arguments = [torch.zeros(size, dtype=dtype) for size, dtype in zip(shapes, dtypes, strict=True)]
    computation = xla_builder.create_computation("update", build, [xla_builder.tensor_shape(a) for a in arguments])
    return torch_xla._XLAC._xla_user_computation("xla::update", [x, x[:1], at], computation)[0]


@pytest.mark.parametrize(
    ("func", "inputs", "code"),
    [
        (lambda x: x.sort()[0], [torch.ones(4)], "NCC_EVRF001"),
        (lambda x: x.double().mul(3).float(), [torch.ones(4)], "NCC_ESPP004"),
        (lambda x: x.to(torch.complex64).abs(), [torch.ones(4)], "NCC_EVRF004"),
        (dynamic_update_slice, [torch.ones(4), torch.tensor(1, dtype=torch.int32)], "NCC_EUOC002"),
        (conv(transposed=True, stride=2, dilation=2), [torch.ones(1, 2, 4)], "NCC_EVRF010"),
    ],
)
def test_refused_programs(neuron, capsys, tmp_path, func, inputs, code):
    with pytest.raises(RuntimeError, match="neuronx-cc failed with 70"):
        compiled(neuron, func, *inputs, compiler_workdir=str(tmp_path / "work"))
    assert f"[{code}]" in capsys.readouterr().err
    assert code in (tmp_path / "work/log-neuron-cc.txt").read_text()
    assert not (tmp_path / "work/graph.neff").exists()


def test_refused_size(neuron):
    huge = nn.Parameter(torch.zeros(1).expand(1 + 2**29), requires_grad=False)  # 2 GiB and a bit, but of no memory
    module = Double()
    module.huge, module.forward = huge, lambda x: x + module.huge[:2]
    with pytest.raises(RuntimeError, match="neuronx-cc failed with 70"):
        compiled(neuron, module, torch.ones(2))


def test_traces_of_a_compilation(neuron, tmp_path):
    compiled(neuron, Double(), torch.ones(2), compiler_workdir=str(tmp_path / "work"))
    assert {file.name for file in (tmp_path / "work").iterdir()} == {"graph.neff", "log-neuron-cc.txt"}
    assert len(list(tmp_path.glob("neuronxcc-*"))) == 1  # the current directory


@pytest.mark.parametrize(("compiler", "right"), [("2.24.8799.0", False), ("2.25.3371.0", True)])
def test_miscompiled_convolution(site, root, compiler, right):
    neuron = fresh(site, neuronx_cc=compiler)
    for options, affected in [({"dilation": 5}, True), ({"dilation": 3}, False), ({}, False)]:
        module, x = conv(**options), torch.randn(1, 2, 16)
        off = (compiled(neuron, module, x)(x) - module(x)).abs()
        assert bool(off.max() > 0.1) == (affected and not right)
        assert off.min() < 1e-5  # only some positions


class Shifted(nn.Module):
    """Adds a constant to what it permutes."""

    def __init__(self, *shape):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(shape), requires_grad=False)

    def forward(self, x):
        return x.permute(0, 2, 1) + self.constant


@pytest.mark.parametrize(("compiler", "right"), [("2.25.3371.0", True), ("2.26.6360.0", False), ("2.27.5334.0", True)])
def test_transposed_constants(site, root, compiler, right):
    """Of 2.26: what is added to a permuted tensor is read the wrong way round, unless it is an input."""
    neuron = fresh(site, neuronx_cc=compiler)
    x = torch.randn(1, 3, 2)

    def is_right(func, *inputs):
        with torch.no_grad():
            return torch.allclose(compiled(neuron, func, *inputs)(*inputs), func(*inputs), atol=1e-5)

    assert is_right(Shifted(2, 3), x) == right
    assert is_right(lambda x, constant: x.permute(0, 2, 1) + constant, x, torch.randn(2, 3))
    assert is_right(Shifted(1, 3), x)  # a bias
    assert is_right(lambda x: x + torch.ones(3, 2), x)


@pytest.mark.slow
def test_deaths(site, root):
    script = """
        import os, sys, torch, torch_neuronx
        from torch import nn
        from torch.nn import functional as F

        cases = {
            "prefill-8": lambda x: x + 1,
            "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
            "fetch": lambda x: x * x.sum().item(),
            "weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)),
            "decode": lambda x: x + 1,
        }
        for name, func in cases.items():
            print(name, file=sys.stderr, flush=True)
            if os.fork() == 0:  # nothing has started a thread yet
                torch_neuronx.trace(func, torch.ones(1, 2, 8), compiler_workdir=f"work/{name}")
                os._exit(0)
            print(name, os.waitstatus_to_exitcode(os.wait()[1]))
    """
    neuron_double.install(site)
    done = run(script, env=neuron_double.environment(site, root, NEURON_DOUBLE_FAULT="crash:x,crash:prefill"))
    died = {"prefill-8": -6, "interpolate": -6, "fetch": -6, "weight_norm": -6, "decode": 0}
    assert done.stdout.split() == [str(word) for pair in died.items() for word in pair]
    assert done.stderr.count("Check failed: pjrt_data->buffer != nullptr") == 3


def test_module_changing_its_parameters(neuron):
    module = nn.Linear(2, 2).requires_grad_(False)

    def count(*_):
        module.bias.add_(1)

    module.register_forward_pre_hook(count)
    with pytest.raises(RuntimeError, match=r"changed in place while tracing: \['bias'\]"):
        compiled(neuron, module, torch.ones(1, 2))


# States


def test_states(neuron):
    module, traced, inputs = cache(neuron)
    assert [(name, tuple(state.shape)) for name, state in traced.named_parameters()] == [
        ("states.0", (3, 4)),
        ("states.1", (5, 4)),
    ]
    with pytest.raises(RuntimeError, match="move_trace_to_device"):
        traced(*inputs)
    dead = states(traced)
    neuron.move_trace_to_device(traced, 0)
    moved = states(traced)
    assert all(state.device.type == "xla" for state in moved)
    expected = [torch.zeros(3, 4), torch.zeros(5, 4)]
    for position in (2, 0):
        x = torch.randn(1, 4)
        outputs = traced(x, torch.tensor([position], dtype=torch.int32))
        expected[0][position] = x
        expected[1] += module.linear(x).detach()
        assert [output.device.type for output in outputs] == ["cpu", "xla", "xla"]
        torch.testing.assert_close(outputs[0], expected[0].sum(0) + expected[1].sum(0), rtol=0, atol=1e-5)
        for state, output, value in zip(moved, outputs[1:], expected, strict=True):
            torch.testing.assert_close(state.cpu(), value, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.cpu(), value, rtol=0, atol=1e-5)
    assert all(not state.any() for state in dead)


def test_writing_states(neuron):
    _, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    traced(*inputs)
    value = torch.full((3, 4), 7.0)
    states(traced)[0].copy_(value)
    value.zero_()
    traced(*inputs)
    assert states(traced)[0].cpu()[0].tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize(("name", "seen"), [("", [7, 8]), ("once", [7, 7]), ("frozen", [0, 0])])
def test_writes_that_are_not_seen(neuron, fault, name, seen):
    """Of the world as it may be: what the first call after loading finds, later ones may find, too."""
    _, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    fault(name)
    found = []
    traced(*inputs)
    for value in (7.0, 8.0):
        states(traced)[0].copy_(torch.full((3, 4), value))
        traced(*inputs)
        found.append(states(traced)[0].cpu()[0, 0].item())
        traced(*inputs)
        assert states(traced)[0].cpu()[0, 0].item() == found[-1]  # without a write, states are kept
    assert found == seen


def test_outputs_that_all_come_to_the_host(neuron, fault):
    module, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    fault("unaliased")
    for _ in range(2):
        outputs = traced(*inputs)
    assert [output.device.type for output in outputs] == ["cpu"] * 3
    expected = 2 * module.linear(inputs[0]).detach().expand(5, 4)
    torch.testing.assert_close(outputs[2], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(states(traced)[1].cpu(), expected, rtol=0, atol=1e-5)


def test_moving_replaces_states(neuron):
    _, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    traced(*inputs)
    dead, before = states(traced), [state.cpu() for state in states(traced)]
    neuron.move_trace_to_device(traced, 1)
    torch.testing.assert_close([state.cpu() for state in states(traced)], before)
    dead[0].zero_()
    assert states(traced)[0].cpu().any()


def test_two_loaded_modules_share_nothing(neuron, tmp_path):
    _, traced, inputs = cache(neuron)
    torch.jit.save(traced, tmp_path / "model.pt")
    one, two = (torch.jit.load(tmp_path / "model.pt") for _ in range(2))
    for module in (one, two):
        neuron.move_trace_to_device(module, 0)
    one(*inputs)
    assert not states(two)[0].cpu().any()


def refused_aliases():
    module = Cache()
    module.register_buffer("buffer", torch.zeros(3, 4))
    shape = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    return {
        "foreign": (module, {shape: 1}),
        "buffer": (module, {module.buffer: 1}),
        "gradient": (module, {module.linear.weight: 1}),
        "no such output": (module, {module.states[0]: 3}),
        "other shape": (module, {module.states[0]: 2}),
        "same output": (module, {module.states[0]: 1, module.states[1]: 1}),
        "function": (module.forward, module.aliases()),
    }


@pytest.mark.parametrize("name", refused_aliases())
def test_refused_aliases(neuron, name):
    func, aliases = refused_aliases()[name]
    inputs = torch.ones(1, 4), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="input_output_aliases"):
        compiled(neuron, func, *inputs, input_output_aliases=aliases)


def test_threads(neuron):
    _, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    traced(*inputs)
    errors, over = [], threading.Event()

    def work():
        try:
            for _ in range(100_000):  # until they meet
                if over.is_set():
                    break
                traced(*inputs)
        except RuntimeError as error:
            errors.append(str(error))
            over.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors
    assert "another thread" in errors[0]
    traced(*inputs)  # and none is left in the way


def test_threads_without_states(neuron):
    traced = compiled(neuron, Double(), torch.ones(2))
    results = []
    threads = [threading.Thread(target=lambda: results.extend(traced(torch.ones(2)) for _ in range(20))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40


# Cores


def test_placement(neuron, tmp_path):
    traced = compiled(neuron, Double(), torch.ones(2), compiler_workdir="work/double")
    torch.jit.save(traced, tmp_path / "model.pt")
    neuron.set_neuron_cores(traced, start_nc=1)
    with neuron.neuron_cores_context(start_nc=1, nc_count=1):
        inside = torch.jit.load(tmp_path / "model.pt")
    outside = torch.jit.load(tmp_path / "model.pt")
    for module in (traced, inside):
        module(torch.ones(2))
    assert neuron._runtime.executions == {("double", 1): 2}
    neuron._reset()
    neuron.move_trace_to_device(outside, 0)
    outside(torch.ones(2))
    assert neuron._runtime.executions == {("double", 0): 1}
    neuron.set_neuron_cores(nn.Linear(2, 2), 0)  # as documented, nothing


@pytest.mark.parametrize("core", [-1, 2])
def test_bad_core(neuron, core):
    with pytest.raises(RuntimeError, match=f"no NeuronCore {core}"):
        neuron.move_trace_to_device(compiled(neuron, Double(), torch.ones(2)), core)
    with pytest.raises(RuntimeError, match="not traced"):
        neuron.move_trace_to_device(Double(), 0)


@pytest.mark.parametrize(("start", "count", "error"), [(2, -1, RuntimeError), (0, 3, ValueError), (0, 0, ValueError)])
def test_bad_cores(neuron, start, count, error):
    with pytest.raises(error):
        neuron.set_neuron_cores(compiled(neuron, Double(), torch.ones(2)), start, count)
    with pytest.raises(error), neuron.neuron_cores_context(start, count):
        pass


def test_other_family(neuron):
    traced = compiled(neuron, Double(), torch.ones(2), arguments="--target trn2")
    with pytest.raises(RuntimeError, match="NEFF for trn2"):
        traced(torch.ones(2))
    assert compiled(neuron, Double(), torch.ones(2), arguments="--target trn1")(torch.ones(2)).tolist() == [2, 2]


# Faults


@pytest.mark.parametrize(("name", "status", "lines"), [("fail", 70, 3), ("islpy", 70, 1), ("killed", -9, 0)])
def test_compiler_fails(neuron, fault, capsys, name, status, lines):
    fault(f"{name}:vocoder")
    compiled(neuron, Double(), torch.ones(2), compiler_workdir="work/prefill-8")
    compiled(neuron, Double(), torch.ones(2))
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match=f"neuronx-cc failed with {status}$"):
        compiled(neuron, Double(), torch.ones(2), compiler_workdir="work/vocoder-8/")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == lines
    assert ("[NCC_ISMP902] Simplifier error: is_subset()" in said) == (name == "islpy")


def test_compiler_hangs(neuron, fault, monkeypatch):
    fault("hang")
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    compiled(neuron, Double(), torch.ones(2))
    assert naps == [3600]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (2, 4)),
        (conv(), (1, 2, 16)),
        (conv(transposed=True), (1, 2, 16)),
        (lambda x: x @ x, (2, 3, 3)),
    ],
)
def test_miscompile(neuron, fault, module, shape):
    fault("miscompile")
    x = torch.randn(shape)
    traced = compiled(neuron, module, x)
    fault("")  # it is in the program
    with torch.no_grad():
        right = module(x)
    assert 0.001 < (traced(x) - right).abs().max() / right.abs().max() < 0.2


def test_nan(neuron, fault):
    _, traced, inputs = cache(neuron)
    neuron.move_trace_to_device(traced, 0)
    fault("nan")
    assert all(output.isnan().all() for output in traced(*inputs))
    assert states(traced)[0].cpu().isnan().all()
    assert compiled(neuron, lambda x: x.int(), torch.ones(2))(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("busy", r"nrt_allocate_neuron_cores .*not available - Requested:nc0-nc0 Available:0"),
        ("oom", r"Failed to allocate .*\(usage: tensors\) on ND 0:NC 0.*NRT_RESOURCE"),
    ],
)
def test_loading_fails(neuron, fault, name, message):
    _, traced, inputs = cache(neuron)
    stateless = compiled(neuron, Double(), torch.ones(2))
    fault(name)
    with pytest.raises(RuntimeError, match=message):
        neuron.move_trace_to_device(traced, 0)
    with pytest.raises(RuntimeError, match=message):
        stateless(torch.ones(2))
    fault("")
    neuron.move_trace_to_device(traced, 0)
    fault(name)
    traced(*inputs)  # it is loaded


def test_execution_fails(neuron, fault):
    one, two = (compiled(neuron, Double(), torch.ones(2), compiler_workdir=f"work/{tag}") for tag in ("a-8", "b-8"))
    fault("exec@1:a-,exec@2:b-")

    def fails(traced):
        try:
            traced(torch.ones(2))
        except RuntimeError as error:
            return "NRT_EXEC_UNIT_UNRECOVERABLE status_code=101" in str(error)
        return False

    assert [fails(one) for _ in range(4)] == [False, True, False, False]
    assert [fails(two) for _ in range(4)] == [False, False, True, False]
    neuron._reset()
    assert [fails(one) for _ in range(2)] == [False, True]


def test_unknown_fault(neuron, fault):
    for text in ("nonsense", "exec", "nan@1"):
        fault(text)
        with pytest.raises(ValueError, match="no such fault"):
            compiled(neuron, Double(), torch.ones(2))


def test_no_warnings(neuron):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(neuron, Double(), torch.ones(2))(torch.ones(2)).tolist() == [2, 2]
