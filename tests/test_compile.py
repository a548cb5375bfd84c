"""torch.compile(fullgraph=True), torch.export and dynamic shapes over the modules: the same bits as in eager mode."""

from __future__ import annotations

from collections.abc import Iterator

import helpers as H
import pytest
import torch
from torch import Tensor, nn

from qkernels.nn import QuantEmbedding, QuantLinear
from qkernels.scheme import PRESETS, Scheme

N, K = 33, 70
SCHEMES = (*PRESETS, "asymmetric")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(scheme: str = "w8a8", *, bias: bool = True) -> QuantLinear:
    resolved = Scheme(activation_symmetric=False) if scheme == "asymmetric" else Scheme.resolve(scheme)
    given = {} if resolved.activation_dynamic else {"act_scale": torch.tensor(0.02)}
    return QuantLinear.from_float(H.seeded(N, K), H.seeded(N, seed=1) if bias else None, resolved, **given)


class Counter:
    """The aot_eager backend, counting the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile_linear_equals_eager(scheme):
    layer = make(scheme)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (H.seeded(3, K), H.seeded(2, 3, K), H.seeded(K), H.hazard_rows(K), H.seeded(3, K).to(torch.bfloat16)):
        H.assert_bits_equal(compiled(x), layer(x))


def test_compile_linear_with_the_default_backend():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for x in (H.seeded(2, K), H.seeded(5, K), H.hazard_rows(K), H.strided(H.seeded(5, K))):
        H.assert_bits_equal(compiled(x), layer(x))


def test_compile_linear_dynamic_rows_need_one_graph():
    layer, counter = make(), Counter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (2, 3, 17, 40):
        x = H.seeded(rows, K, seed=rows)
        H.assert_bits_equal(compiled(x), layer(x))
    assert len(counter.graphs) == 1
    nodes = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.qkernels.linear_w8a8 in nodes or torch.ops.qkernels.linear_w8a8.default in nodes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile_linear_gradient(scheme):
    layer = make(scheme)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = H.seeded(3, K).requires_grad_(), H.seeded(3, K).requires_grad_()
    grad = H.seeded(3, N, seed=2)
    compiled(x).backward(grad)
    layer(y).backward(grad)
    torch.testing.assert_close(x.grad, y.grad)


def test_compile_linear_gradient_with_the_default_backend():
    model = nn.Sequential(nn.Linear(K, K), make(), nn.Linear(N, 3))
    x = H.seeded(4, K)
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for actual, p in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(actual, p.grad, rtol=2e-2, atol=2e-2)  # one int8 step of the activations


def test_compile_linear_autocast():
    layer = make()

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = H.seeded(3, K)
    H.assert_bits_equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), layer(x.to(torch.bfloat16)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    H.assert_bits_equal(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H.assert_bits_equal(compiled(x), layer(x.to(torch.bfloat16)))


def test_compile_linear_after_the_weights_changed():
    layer, other = make(), QuantLinear.from_float(H.seeded(N, K, seed=7), H.seeded(N, seed=8))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = H.seeded(3, K)
    compiled(x)
    layer.load_state_dict(other.state_dict())
    H.assert_bits_equal(compiled(x), other(x))
    layer.load_state_dict(make().state_dict(), assign=True)
    H.assert_bits_equal(compiled(x), layer(x))
    static = make("w8a8_static")
    compiled = torch.compile(static, fullgraph=True, backend="aot_eager")
    compiled(x)
    static.act_scale.fill_(0.5)
    H.assert_bits_equal(compiled(x), static(x))


def test_compile_wrong_width_is_an_error():
    compiled = torch.compile(make(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"expected {K} features"):
        compiled(torch.zeros(3, K + 1))


def test_compile_weight_dtype_builds_nothing():
    layer, counter = make(), Counter()

    def call(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype)) * layer.weight.shape[0]

    x = H.seeded(3, K).to(torch.bfloat16)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    H.assert_bits_equal(compiled(x), call(x))

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    x = H.seeded(3, K)
    torch.testing.assert_close(torch.compile(product, fullgraph=True, backend="aot_eager")(x), product(x))


@pytest.mark.parametrize("tied", (False, True))
def test_compile_embedding(tied):
    embedding = QuantEmbedding.from_embedding(nn.Embedding(130, K))
    head = embedding.shared_head(H.seeded(130)) if tied else make()
    model = nn.Sequential(embedding, head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3,), (2, 5)):
        ids = torch.randint(0, 130, shape)
        H.assert_bits_equal(compiled(ids), model(ids))


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("scheme", ("w8a8", "w8a8_static", "w4a16"))
def test_export_linear(scheme, strict):
    model = nn.Sequential(make(scheme)).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (H.seeded(5, K),), dynamic_shapes=({0: rows},), strict=strict)
    x = H.seeded(9, K, seed=3)
    H.assert_bits_equal(program.module()(x), model(x))
    assert any("qkernels" in str(node.target) for node in program.graph.nodes)


def test_export_saves_and_loads(tmp_path):
    model = nn.Sequential(make()).eval()
    program = torch.export.export(model, (H.seeded(5, K),))
    torch.export.save(program, tmp_path / "layer.pt2")
    x = H.seeded(5, K, seed=3)
    H.assert_bits_equal(torch.export.load(tmp_path / "layer.pt2").module()(x), model(x))
