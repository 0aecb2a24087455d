"""Products of a few rows with packed weights, and the tokens per second of a packed model, on one GPU::

    python benchmarks/decode.py                  # all, to results/decode.csv and decode_tokens.csv here
    python benchmarks/decode.py checks products

Each product is captured as a CUDA graph of a round over so many copies of the weight that none is still in
the cache when its turn comes. Ours and transformers' count the quantization of the activations. ``share`` is
the stored bytes per second over the bandwidth of a large copy (bytes read and written) in the same run; where
the weight is small, what is left is the start of the kernels. ``--ways`` times ours cut in other ways too,
and without overlap (``how``); the empty one is what the package takes.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from common import RESULTS, append_csv, free, machine
from torch import Tensor, nn

from axolotl_bitnet.ops import pack_codes, packed_matmul, unpack_codes
from axolotl_bitnet.ops.kernels import decode, matvec, registers
from axolotl_bitnet.serving.packed_linear import PackedLinear, apply, prepare

MODELS = {
    "Falcon-E-1B": (2048, 8192),
    "Falcon-E-3B": (2048, 13312),
    "bitnet-2B": (2560, 6912),
    "Falcon3-10B": (3072, 23040),
}
"""Hidden and intermediate size."""
ROWS = (1, 2, 4, 8, 16)
CACHE = 400 << 20  # bytes of weights in a round: many times the L2 cache
COLUMNS = ("machine", "date", "model", "out", "in", "rows", "who", "how", "us", "share", "x_bf16", "bf16_mib")


def graph_us(calls: list[Callable[[], Any]], repeats: int = 12) -> float:
    """Median time of a call, in microseconds, when all of them follow each other as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1000 / len(calls)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    x = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (graph_us([lambda: y.copy_(x)] * 4) * 1e-6)


def round_of(make: Callable[[], Tensor], size: int) -> list[Tensor]:
    return [make() for _ in range(max(4, CACHE // size))]


def copies(layer: nn.Module, count: int) -> list[nn.Module]:
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def bytes_of(out: int, columns: int) -> Tensor:
    return pack_codes(torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda"))


def checks() -> None:
    """The kernel against the definition, on this GPU."""
    cases = [
        (1, 2048, [13312]),
        (3, 100, [12]),
        (8, 13312, [2048]),
        (16, 2048, [2048, 256, 256]),
        (9, 2560, [640, 4]),
    ]
    cases += [(5, 1000, [8, 100, 8]), (2, 23040, [3072]), (17, 2048, [2048, 256, 256]), (200, 512, [64, 64])]
    for number, (rows, columns, sizes) in enumerate(cases):
        for dtype in (torch.bfloat16, torch.float32, torch.float16)[: 3 if number < 2 else 1]:
            x = torch.randn(rows, columns, device="cuda")
            weight = torch.cat([bytes_of(size, columns) for size in sizes])
            s = torch.rand(len(sizes), device="cuda") * 90 + 0.5
            bias = torch.randn(sum(sizes), device="cuda") if rows % 2 else None
            expected = packed_matmul.plain(x, weight, s, sizes, bias, dtype)
            for _ in range(3):
                found = packed_matmul(x, weight, s, sizes, bias, dtype)
                assert torch.equal(found, expected), f"{rows} x {columns} x {sizes} in {dtype} differs"
    print(f"{len(cases)} products equal to the definition, bit for bit", flush=True)


def as_vllm() -> None:
    """A merged layer, built and applied as vLLM's linear layers are: prefill, decode, a captured graph."""
    sizes, columns = [2048, 256, 256], 2048
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.cat([bytes_of(size, columns) for size in sizes]), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.rand(3, device="cuda") * 50 + 1, requires_grad=False)
    layer.bias = None
    prepare(layer, sizes, False, "qkv_proj")
    compiled = torch.compile(lambda x: apply(layer, x * 2, None) + 1, fullgraph=True)
    for rows in (512, 33, 16, 4, 1):
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        plain = packed_matmul.plain(x, layer.weight, layer.divisors, sizes, None, x.dtype)
        assert torch.equal(apply(layer, x, None), plain)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = apply(layer, x, None)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, packed_matmul.plain(x, layer.weight, layer.divisors, sizes, None, x.dtype))
    x = torch.randn(4, columns, device="cuda", dtype=torch.bfloat16)
    expected = packed_matmul.plain(x * 2, layer.weight, layer.divisors, sizes, None, x.dtype) + 1
    assert torch.equal(compiled(x), expected)
    print(
        "merged layer: prefill, decode, CUDA graph and torch.compile give the definition's bits", flush=True
    )


def ways(out: int, columns: int, rows: int) -> dict[str, dict[str, Any]]:
    """Other cuts than the package's, and its own without overlap."""
    found: dict[str, dict[str, Any]] = {"apart": {"how": None, "overlap": False}} if rows == 1 else {}
    if rows > 1:
        cuts = [(8, 4, 1, 8), (8, 4, 2, 8), (8, 2, 1, 8), (4, 4, 1, 8), (4, 4, 2, 8)]
        if columns > 4096:
            cuts = [(4, 8, 1, 13), (4, 16, 1, 13), (8, 8, 1, 13), (8, 16, 1, 13)]
        for cut in cuts:
            found["registers " + "/".join(map(str, cut))] = {"how": registers.Rows(*cut)}
    if rows > 2:
        return found
    narrow = columns <= 4096
    cuts = (
        [(1, 4, 4), (2, 4, 4), (4, 4, 4), (1, 8, 8), (2, 8, 8)]
        if narrow
        else [(1, 4, 4), (1, 4, 8), (2, 4, 8)]
    )
    for each, beside, warps in cuts:
        wide = 128 * warps // beside
        whole = each * rows <= 4 and rows * columns <= 64 * wide
        for quantizing in [True, False] if whole and beside == 4 else [whole]:
            if beside * each * 64 <= out // 4:
                words = matvec.cut_in_words(columns, rows, each, beside, wide, warps, quantizing)
                found["words " + "/".join(map(str, words))] = {"how": words}
    return found


def prefill(bandwidth: float, peers: list[str], models: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows for which the weights are unpacked first, beside sixteen at a time."""
    for model in models:
        hidden, inner = MODELS[model]
        if model not in ("Falcon-E-3B", "Falcon3-10B"):
            continue
        for out, columns in ((inner, hidden), (hidden, inner)):
            packed = round_of(lambda o=out, c=columns: bytes_of(o, c), out * columns // 4)[:8]
            dense = round_of(lambda o=out, c=columns: dense_of(o, c), out * columns * 2)[:8]
            layers = [_transformers_layer(weight) for weight in packed] if "transformers" in peers else []
            for rows in (32, 64, 256, 2048):
                x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
                calls = {("bf16", ""): [partial(nn.functional.linear, x, weight) for weight in dense]}
                calls["axolotl-bitnet", ""] = [partial(unpacked, x, weight) for weight in packed]
                if rows <= 64:
                    calls["axolotl-bitnet", "in sixteens"] = [partial(in_sixteens, x, w) for w in packed]
                if layers and rows == 2048:
                    calls["transformers", ""] = [partial(layer, x) for layer in layers]
                yield _timed(model, out, columns, rows, calls, bandwidth)
            del packed, dense, layers
            free()


def unpacked(x: Tensor, weight: Tensor) -> Tensor:
    return packed_matmul(x, weight, SCALE(), [4 * len(weight)], None, torch.bfloat16)


def in_sixteens(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([ours(some, weight) for some in x.split(decode.MAX_ROWS)])


def products(
    bandwidth: float, peers: list[str], models: list[str], counts: list[int], others_too: bool
) -> Iterator[list[dict[str, Any]]]:
    for model in models:
        hidden, inner = MODELS[model]
        for out, columns in ((inner, hidden), (hidden, inner), (hidden, hidden)):
            packed = round_of(lambda o=out, c=columns: bytes_of(o, c), out * columns // 4)
            dense = round_of(lambda o=out, c=columns: dense_of(o, c), out * columns * 2)
            others = {peer: copies(PEERS[peer](packed[0], out, columns), len(packed)) for peer in peers}
            for rows in counts:
                x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
                calls = {("bf16", ""): [partial(nn.functional.linear, x, weight) for weight in dense]}
                how_else = ways(out, columns, rows) if others_too else {}
                for name, how in {"": {}, **how_else}.items():
                    calls["axolotl-bitnet", name] = [partial(ours, x, weight, **how) for weight in packed]
                if rows in (1, 8, 16):
                    calls |= {(peer, ""): [partial(m, x) for m in made] for peer, made in others.items()}
                yield _timed(model, out, columns, rows, calls, bandwidth)
            del packed, dense, others
            free()


def dense_of(out: int, columns: int) -> Tensor:
    return torch.randn(out, columns, device="cuda", dtype=torch.bfloat16)


def ours(x: Tensor, weight: Tensor, **how: Any) -> Tensor:
    return decode._few_rows(x, weight, SCALE(), (4 * len(weight),), None, torch.bfloat16, **how)


@cache
def SCALE() -> Tensor:
    return torch.full((1,), 20.0, device="cuda")


def _timed(
    model: str, out: int, columns: int, rows: int, calls: dict[tuple[str, str], Any], bandwidth: float
) -> list[dict[str, Any]]:
    times: dict[tuple[str, str], float] = {}
    for key, each in calls.items():
        try:
            times[key] = graph_us(each)
        except Exception as error:
            print(f"{key} {out} x {columns}, {rows} rows: {repr(error)[:200]}", flush=True)
            torch.cuda.synchronize()
    line = ", ".join(f"{who} {how} {us:.2f}" for (who, how), us in times.items())
    print(f"{model} {out} x {columns}, {rows} rows, us: {line}", flush=True)
    shape = {"model": model, "out": out, "in": columns, "rows": rows}
    found = []
    for (who, how), us in times.items():
        nbytes = out * columns * (2 if who == "bf16" else 0.25)
        figures = {
            "us": round(us, 2),
            "share": round(nbytes / (us * 1e-6) / bandwidth, 2),
            "x_bf16": round(times["bf16", ""] / us, 2),
            "bf16_mib": round(out * columns * 2 / 2**20, 1),
        }
        found.append({**shape, "who": who, "how": how, **figures})
    return found


def _transformers_layer(weight: Tensor) -> nn.Module:
    from transformers.integrations.bitnet import BitLinear

    layer = BitLinear(weight.shape[1], weight.shape[0] * 4, False, "cuda", torch.bfloat16)
    layer.weight, layer.weight_scale = weight, torch.full((1,), 20.0, device="cuda", dtype=torch.bfloat16)
    return layer


def _humming_layer(weight: Tensor, out: int, columns: int) -> nn.Module:
    """2-bit weights with a scale per row, 8-bit activations with a scale per token."""
    from humming.layer import HummingLayer

    how = {"weight_config": {"dtype": "int2"}, "input_config": {"dtype": "int8"}}
    layer = HummingLayer(shape_n=out, shape_k=columns, torch_dtype=torch.bfloat16, **how).cuda()
    layer.load_from_unquantized(unpack_codes(weight).to(torch.bfloat16))
    layer.transform()
    return layer


PEERS = {"transformers": lambda weight, out, columns: _transformers_layer(weight), "humming": _humming_layer}


def tokens(layers: int, peers: list[str]) -> list[dict[str, Any]]:
    """Tokens a second of the 3B shape with random weights, one sequence, a CUDA graph a token."""
    from scaling import SHAPES, VOCABULARY
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    shape = SHAPES["3B"] | {"num_hidden_layers": layers}
    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for who in ("bf16", "axolotl-bitnet", *peers):
        if who != "bf16":
            for name, module in list(model.named_modules()):
                if name.endswith("_proj"):
                    weight = module.weight if module.weight.dtype == torch.uint8 else None
                    out, columns = module.out_features, module.in_features
                    weight = bytes_of(out, columns) if weight is None else weight
                    model.set_submodule(name, _layer(who, weight, out, columns, name))
            free()
        weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        row: dict[str, Any] = {
            "model": f"3B shape, {layers} layers",
            "who": who,
            "weights_gib": round(weights / 2**30, 2),
        }
        for way, measure in (("graph", _graph_tokens), ("eager", _eager_tokens)):
            try:
                row[f"{way}_tokens_s"] = round(measure(model), 1)
            except Exception as error:
                print(f"{who}, {way}: {repr(error)[:300]}", flush=True)
        print(row, flush=True)
        found.append(row)
    return found


def _layer(who: str, weight: Tensor, out: int, columns: int, name: str) -> nn.Module:
    if who == "transformers":
        return _transformers_layer(weight.data)
    layer = PackedLinear(columns, out, False, torch.bfloat16).cuda()
    layer.weight.data = weight
    layer.weight_scale = torch.full((1,), 20.0, device="cuda")
    prepare(layer, [out], False, name)
    return layer


def _step(model: Any) -> Callable[[], None]:
    """One greedy token after a prompt of 64, in place."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=512)
    ids = torch.randint(0, 1000, (1, 64), device="cuda")
    model(ids, past_key_values=cache, use_cache=True)
    token, place = ids[:, -1:].clone(), torch.full((1, 1), 64, device="cuda")
    mask = torch.ones(1, 1, 1, 512, dtype=torch.bool, device="cuda")

    def step() -> None:
        logits = model(
            token, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        ).logits
        token.copy_(logits[:, -1:].argmax(-1))
        place.add_(1)

    return step


@torch.inference_mode()
def _graph_tokens(model: Any) -> float:
    step = _step(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _a_second(graph.replay, 128)


@torch.inference_mode()
def _eager_tokens(model: Any) -> float:
    step = _step(model)
    step()
    return _a_second(step, 24)


def _a_second(step: Callable[[], None], count: int) -> float:
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["checks", "layer", "products", "prefill", "tokens"]
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {', '.join(parts)}; default: all")
    parser.add_argument(
        "--peers", default="transformers", help="beside bf16; also humming; default %(default)s"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of x; default %(default)s")
    parser.add_argument("--models", nargs="+", default=[*MODELS], help="whose shapes; default: all")
    parser.add_argument("--ways", action="store_true", help="time ours cut in other ways too")
    parser.add_argument("--layers", type=int, default=32, help="of the model whose tokens are counted")
    args = parser.parse_args()
    peers = args.peers.split(",") if args.peers else []
    bandwidth = copy_bandwidth()
    about = {"machine": f"{machine()}, copies {bandwidth / 1e9:.0f} GB/s", "date": time.strftime("%Y-%m-%d")}
    print(about["machine"], flush=True)
    if "checks" in args.parts:
        checks()
    if "layer" in args.parts:
        as_vllm()
    if "tokens" in args.parts:
        rows = [about | row for row in tokens(args.layers, peers)]
        columns = ("machine", "date", "model", "who", "weights_gib", "graph_tokens_s", "eager_tokens_s")
        append_csv(RESULTS / "decode_tokens.csv", columns, rows)
    measured = []
    if "products" in args.parts:
        measured.append(products(bandwidth, peers, args.models, args.rows, args.ways))
    if "prefill" in args.parts:
        measured.append(prefill(bandwidth, peers, args.models))
    for rows in chain.from_iterable(measured):
        append_csv(RESULTS / "decode.csv", COLUMNS, [about | row for row in rows])


if __name__ == "__main__":
    main()
