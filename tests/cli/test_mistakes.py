"""Every mistake of a user's ends with 2 and one line that says what to do; nothing goes to stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Cli

SAY = ("--prompt", "Once upon a time", "--max-tokens", "4", "--json")


def short(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def no_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tok512.model", "tokenizer.model"):
        (directory / name).unlink(missing_ok=True)


def set_config(**fields: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    "damage, words",
    [
        (short, "model.safetensors"),
        (cut_header, "model.safetensors"),
        (pickle_only, "pickle"),
        (no_weights, "safetensors"),
        (no_config, "config.json"),
        (broken_config, "not valid JSON"),
        (no_tokenizer, "tokenizer"),
        (set_config(architectures=["WhaleForCausalLM"]), "WhaleForCausalLM"),
        (set_config(mystery=3), "--ignore-config-field mystery"),
        (set_config(hidden_size=72), ""),
    ],
)
def test_damaged_models(
    cli: Cli, stories: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    damage(model)
    assert words in cli("generate", model, *SAY).complaint


def test_a_format_plan_for_other_backends(cli: Cli, stories: Path) -> None:
    assert (
        "the nearest that it has is int8"
        in cli("graph", stories, "--formats", "--weight-format", "*=fp8").complaint
    )
    plan = json.loads(cli("graph", stories, "--formats", "--json", "--backend", "reference", "-q", "fp8").out)
    rows, columns = plan["matrices"][0]["shape"]
    assert plan["matrices"][0]["stored"] == "fp8" and plan["matrices"][0]["bytes"] == rows * (columns + 4)


@pytest.mark.parametrize("flags", [("--after", "all"), ("--scope", "layers.0"), ("--costs",)])
def test_formats_are_shown_alone(cli: Cli, stories: Path, flags: tuple[str, ...]) -> None:
    assert f"leave out {flags[0]}" in cli("graph", stories, "--formats", *flags).complaint


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--quantization", "int3"), "int4"),
        (("--quantization", "int4", "--dtype", "bfloat16"), "without --dtype, or without --quantization"),
        (("--dtype", "float12"), "bfloat16"),
        (("--kv-cache-dtype", "int1"), "bf16"),
        (("--kv-cache-dtype", "fp8"), "that can be: with --kv-cache-dtype int8"),
        (("--quantization", "fp8"), "that can be: with --quantization int8"),
        (("--quantization", "fp8-g32"), "fp8 has one scale per channel; leave out its group 32"),
        (("--weight-format", "*=fp8"), "the nearest that it has is int8"),
        (("--kv-cache-dtype", "fp8_e5m2"), "int8"),
        (("--load-format", "pickle"), "safetensors"),
        (("--backend", "gpu"), "reference"),
        (("--isa", "neon9"), "avx2"),
        (("--threads", "0"), "threads 0 must be 1"),
        (("--page-size", "3"), "multiple of 16"),
        (("--page-size", "1600000000000"), "16 to 65536"),
        (("--threads", "99999999999"), "1 to 4096"),
        (("--max-num-batched-tokens", "99999999999999"), "at most 1048576"),
        (("--revision", "main"), "is a directory; leave it out"),
        (("--static-batching", "sometimes"), "ragged or padded"),
        (("--static-batching", "ragged", "--prefill-chunk", "4"), "--prefill-chunk belongs to continuous"),
        (("--backend", "reference", "--isa", "avx2", "--no-memory-reuse"), "that can be: with --backend cpu"),
        (("--preempt-by", "swap"), "with --swap-bytes 1GiB"),
        (("--device", "cuda", "--threads", "2"), "with --backend cpu, or without --threads"),
        (("--device", "cuda", "--isa", "avx2"), "the cuda backend runs the GPU"),
        (("--device", "cuda", "--no-flash-attention"), "no other attention than FlashAttention"),
        (("--device", "cuda", "--swap-bytes", "1MiB", "--swap-directory", "/tmp"), "pages to host memory"),
        (("--device", "cuda", "--speculative-config", '{"method": "eagle"}'), "a head is fed"),
        (("--itl-goal-ms", "0"), "itl_goal_ms 0.0 must be a number of milliseconds above 0"),
        (("--max-wait-ms", "nan"), "max_wait_ms"),
        (("--static-batching", "ragged", "--itl-goal-ms", "40"), "needs continuous batching"),
        (("--length-buckets",), "that can be: with --static-batching ragged, or without --length-buckets"),
        (("--no-operator-fusion", "--no-fusion-rule", "qkv_merge"), "without --no-fusion-rule, or without"),
        (("--no-layer-fusion", "--layer-fusion-rows", "64"), "belongs to layer fusion, which --no-layer"),
        (
            ("--no-paged-attention", "--swap-bytes", "1M", "--swap-directory", "/"),
            "-directory belong to",
        ),
        (("--no-paged-attention", "--page-size", "32"), "--page-size belongs to PagedAttention"),
        (("--no-paged-attention", "--enable-prefix-caching"), "--enable-prefix-caching belongs to"),
        (("--kv-bytes", "1GiB", "--memory-budget", "500MiB"), "are needed"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--temperature", "warm"), "--temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--min-p", "-0.1"), "min_p"),
        (("--n", "0"), "n 0"),
        (("--logprobs", "1000"), "logprobs"),
        (("--stop", ""), "stop"),
        (("--regex", "a{99999}"), "at most 10000"),
        (("--regex", "a", "--choice", "b"), "exactly one"),
        (("--json-schema", "/does/not/exist.json"), "give a file or the text itself"),
        (("--json-schema", "{3}"), "not a JSON schema"),
        (("--grammar", "start: ("), "grammar cannot be used"),
        (("--regex", "("), "regex parse error: unclosed group"),
        (("--json-schema", "{bad"), "double quotes: line 1 column 2"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--max-model-len", "4"), "context holds 4"),
        (("--max-model-len", "0"), "max_model_len"),
        (("--memory-budget", "100K"), "are needed"),
        (("--memory-budget", "plenty"), "2GiB"),
        (("--kv-bytes", "10"), "--kv-bytes"),
        (("--bogus",), "--bogus"),
        (("--model", "another"), "two models"),
        (("--config", "/does/not/exist.toml"), "cannot read"),
        (("--prompt-file", "x"), "give one"),
        (("--revision",), "--revision"),
    ],
)
def test_flags_that_cannot_be(cli: Cli, stories: Path, flags: tuple[str, ...], words: str) -> None:
    assert words in cli("generate", stories, *SAY, *flags).complaint


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("generate", "MODEL"), "--prompt"),
        (("generate",), "no model and no prompt were given; say `gossamer generate MODEL --prompt TEXT`"),
        (("generate", "MODEL", "hi"), "did you mean --prompt 'hi'?"),
        (("generate", "MODEL", "it's", "so"), "did you mean --prompt 'it'\\''s so'?"),
        (("chat", "MODEL", "hi"), "(hi); see `gossamer chat --help`"),
        (("generat",), "Did you mean 'generate'? See `gossamer --help`"),
        (("bench", "MODEL"), "; say `gossamer bench latency MODEL` or `gossamer bench throughput MODEL`"),
        (("generate", "MODEL", "-p", ""), "empty"),
        (("generate", "MODEL", "-p", "\udcff"), "UTF-8"),
        (("generate", "MODEL", "-p", "a b c " * 400), "context holds 512"),
        (("generate", "MODEL", "--prompt-file", "/does/not/exist"), "/does/not/exist"),
        (("generate", "-p", "x"), "no model"),
        (("generate", "/does/not/exist", "-p", "x"), "/does/not/exist"),
        (("chat", "MODEL"), "--chat-template"),
        (("graph", "MODEL", "--after", "nonsense"), "nonsense"),
        (("graph", "MODEL", "--scope", "layers.99"), "layers.99"),
        (("bench",), "bench --help"),
        (("bench", "latency", "MODEL", "--batch-size", "0"), "batch_size"),
        (
            ("bench", "latency", "MODEL", "--input-len", "512"),
            "--input-len 512 + --output-len 64 = 576 tokens, but this model serves 512; lower one of them",
        ),
        (("bench", "latency", "MODEL", "-c", "64"), "but --max-model-len is 64"),
        (("bench", "throughput", "MODEL", "--num-prompts", "0"), "num_prompts"),
        (("bench", "throughput", "MODEL", "--trace", "/does/not/exist"), "/does/not/exist"),
        (("bench", "throughput", "MODEL", "--request-rate", "0"), "rate"),
        (("bench", "dynamic", "MODEL"), "give --itl-goal-ms"),
        (("bench", "dynamic", "MODEL", "--itl-goal-ms", "9", "--load", "heavy"), "'heavy' is unknown"),
        (("bench", "dynamic", "MODEL", "--itl-goal-ms", "9", "--input-len", "160"), "another --load"),
        (("bench", "dynamic", "MODEL", "--itl-goal-ms", "9", "--output-len", "999"), "lower --input-len or"),
        (("bench", "prefix", "MODEL", "--turns", "99"), "lower --input-len or --turns"),
        (("bench", "prefix", "MODEL", "--rounds", "0"), "rounds 0 must be at least 1"),
        (("serve", "MODEL", "--port", "99999"), "port"),
        (("probe", "--isa", "mmx"), "mmx"),
        (("nonsense",), "nonsense"),
    ],
)
def test_lines_that_cannot_be(cli: Cli, stories: Path, arguments: tuple[str, ...], words: str) -> None:
    line = [str(stories) if a == "MODEL" else a for a in arguments]
    ran = cli(*line)
    if arguments == ("chat", "MODEL"):  # found out once the model is there: the memory table stands above
        assert ran.code == 2 and words in ran.err.splitlines()[-1]
    else:
        assert words in ran.complaint


def test_a_trace_must_have_its_columns(cli: Cli, stories: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    for content, words in (("a,b\n1,2\n", "ContextTokens"), ("", "none")):
        trace.write_text(content)
        assert words in cli("bench", "throughput", stories, "--trace", trace).complaint
    trace.write_text("ContextTokens,GeneratedTokens\n4,many\n")
    assert "line 2" in cli("bench", "throughput", stories, "--trace", trace).complaint


def test_our_own_mistakes_show_a_traceback(cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("gossamer.cli.stream.run_request", broken)
    ran = cli("generate", stories, *SAY)
    assert ran.code == 1 and "Traceback" in ran.err and "a bug" in ran.err


def test_a_package_that_is_missing_is_named(cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gossamer.server.run", raising=False)
    assert "uvicorn is not installed" in cli("serve", stories).complaint


def test_interrupted(cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.cli.stream.run_request", stopped)
    ran = cli("generate", stories, *SAY)
    assert ran.code == 130 and "Traceback" not in ran.err


def test_memory_that_runs_out_is_one_line(monkeypatch: pytest.MonkeyPatch, cli: Cli, stories: Path) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("gossamer.cli.generate._start", none_left, raising=True)
    assert "memory ran out" in cli("generate", stories, *SAY).complaint


def test_a_model_that_computes_nan_is_an_error_that_says_so(shared: Path, tmp_path: Path) -> None:
    from gossamer.checkpoint.safetensors import Checkpoint
    from gossamer.checkpoint.safetensors_writer import write_safetensors

    directory = tmp_path / "nan"
    shutil.copytree(shared / "models/stories260K", directory, copy_function=shutil.copyfile)
    checkpoint = Checkpoint(directory)
    tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.names()}
    tensors["model.norm.weight"][:] = np.nan
    write_safetensors(directory / "model.safetensors", tensors)
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "generate", str(directory), "-p", "hello", "-n", "2"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "NaN" in done.stderr and "Traceback" not in done.stderr


def test_what_is_not_built_says_so(cli: Cli) -> None:
    line = ["generate", "gossamer/pocket", "-p", "x", "--tensor-parallel-size=2"]
    assert "not built yet" in cli(*line).complaint


def test_a_gpu_that_is_not_there(cli: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for line in (("generate", stories, *SAY), ("serve", stories, "--port", "0")):
        complaint = cli(*line, "--device", "cuda").complaint
        assert "needs an NVIDIA GPU" in complaint and "--device cpu runs here" in complaint


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--gpu-memory-utilization", "0.9"), "--memory-budget"),
        (("--enable-chunked-prefill",), "always on; --prefill-chunk"),
        (("--trust-remote-code",), "never run"),
        (("--tokenizer=x",), "the model's directory"),
        (("-ngl", "99"), "--offload brings what does not fit on a GPU"),
        (("--enforce-eager",), "--no-layer-fusion records no CUDA graphs"),
        (("--cpu-offload-gb", "4"), "--offload auto"),
        (("--swap-space", "4"), "--swap-bytes"),
        (("--ctx", "4096"), "--max-model-len"),
    ],
)
def test_flags_of_other_engines_say_what_to_use(cli: Cli, flags: tuple[str, ...], words: str) -> None:
    for line in (("generate", "gossamer/pocket"), ("serve", "gossamer/pocket"), ("bench", "latency", "x")):
        complaint = cli(*line, *flags).complaint
        assert words in complaint and complaint.startswith(f"gossamer: {flags[0].split('=')[0]}: ")
