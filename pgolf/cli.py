"""The command line. A mistake of the user gives one line and exit code 2, never a traceback."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf import __version__
from pgolf.errors import PgolfError

INTERRUPTED = 130


def _settings_help() -> str:
    from pgolf import config, recipes

    rows = config.describe()
    return f"recipes: {', '.join(recipes.RECIPES)}\n\nsettings (--set KEY=VALUE; defaults are recipe record's):\n{rows}"


def _parser(with_settings: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgolf", description=__import__("pgolf").__doc__)
    parser.add_argument("--version", action="version", version=f"pgolf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    epilog = _settings_help() if with_settings else None

    def command(name: str, help: str, settings: bool = False) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=epilog if settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def common(sub: argparse.ArgumentParser, data: bool = True) -> None:
        if data:
            sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of shards")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA when present")

    def recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--recipe", default="record", help="named configuration (default: record)")
        _set(sub)
        sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
        sub.add_argument(
            "--stop-after", type=float, metavar="N", help="end after N seconds (steps with train.schedule_by=step)"
        )
        sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")

    def _set(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="override")

    def scoring(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--docs", type=int, metavar="N", help="score only the first N validation documents")

    sub = command("demo", "train, quantize, pack and score a small model on the standard library's own documentation")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    _set(sub)

    sub = command("data", "build token shards and tokenizers from text")
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="tokenize .txt, .jsonl(.gz/.xz/.zst) or .parquet files into shards")
    build.add_argument("inputs", nargs="+", type=Path, metavar="FILE")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of shards to write")
    build.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece model")
    build.add_argument("--val-docs", type=int, metavar="N", help="the first N documents become validation")
    build.add_argument("--split", choices=("train", "val"), help="the files are split already: write this part")
    build.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard at most")
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    build.add_argument("--field", default="text", metavar="NAME", help="JSON field or column that holds the text")
    tokenizer = actions.add_parser("tokenizer", help="train a SentencePiece tokenizer")
    tokenizer.add_argument("inputs", nargs="+", type=Path, metavar="FILE")
    tokenizer.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    tokenizer.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens (default 8192)")
    tokenizer.add_argument("--setting", choices=("record", "lossless"), default="record", help="normalization")
    tokenizer.add_argument("--field", default="text", metavar="NAME", help="JSON field or column that holds the text")
    audit = actions.add_parser("audit", help="look for validation documents among the training shards")
    audit.add_argument("data", type=Path, metavar="DIR")

    sub = command("train", "train a model", settings=True)
    common(sub)
    recipe(sub)

    sub = command("quantize", "quantize a trained run and pack it into model.pgolf", settings=True)
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder")
    common(sub)
    sub.add_argument("--budget", type=int, metavar="BYTES", help="fill so many bytes, code included (quantize.budget)")
    _set(sub)

    sub = command("eval", "score a run folder's artifact, or a model.pgolf file, in bits per byte", settings=True)
    sub.add_argument("path", type=Path, metavar="RUN|FILE")
    common(sub)
    sub.add_argument("--weights", action="store_true", help="score the unquantized weights of a run folder")
    sub.add_argument("--ttt", action=argparse.BooleanOptionalAction, default=True, help="adapt while scoring (default)")
    scoring(sub)
    _set(sub)

    sub = command(
        "tune-ttt", "find settings of test-time training for a budget of seconds, on training documents alone"
    )
    sub.add_argument("path", type=Path, metavar="RUN|FILE")
    common(sub)
    sub.add_argument("--budget", type=float, metavar="SECONDS", help="for scoring the whole stream (default: no limit)")
    sub.add_argument(
        "--targets",
        type=int,
        metavar="N",
        help="its tokens (default: the manifest's count of validation; for N devices an Nth)",
    )
    sub.add_argument("--docs", type=int, default=400, metavar="N", help="training documents to try on (default 400)")
    sub.add_argument("--trials", type=int, default=32, metavar="N", help="settings to try at most (default 32)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="trials and picture (default: tune-ttt by the artifact)")
    _set(sub)

    sub = command("run", "train, quantize, pack and score: the whole record in one command", settings=True)
    common(sub)
    recipe(sub)
    scoring(sub)

    sub = command("generate", "sample text from an artifact")
    sub.add_argument("path", type=Path, metavar="RUN|FILE")
    common(sub, data=False)
    sub.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: tokenizer.model beside the artifact")
    sub.add_argument("--prompt", default="", help="text to continue")
    sub.add_argument("--tokens", type=int, default=200, metavar="N", help="longest continuation, tokens")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    sub.add_argument("--top-k", type=int, default=50, metavar="K", help="sample from the K likeliest (0: all)")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("inspect", "say where an artifact's bytes go, weight by weight, and what another budget would change")
    sub.add_argument("path", type=Path, metavar="RUN|FILE")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG as well (needs matplotlib)")
    sub.add_argument("--what-if", type=int, metavar="BYTES", help="estimate bits and distortion at another budget")

    command("doctor", "say what this machine offers: compilers, GPU, kernels, attention backends")
    return parser


def _device(name: str) -> Any:
    from pgolf import parallel

    return parallel.start(name)


def _artifact_path(path: Path) -> Path:
    if path.is_dir():
        path = path / "model.pgolf"
    if not path.is_file():
        raise PgolfError(f"{path} does not exist; train and quantize first, or name a model.pgolf file")
    return path


def _check_numbers(args: argparse.Namespace) -> None:
    """Numbers that would train or score nothing."""
    for name in ("docs", "stop_after", "budget", "what_if", "targets", "trials"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise PgolfError(f"--{name.replace('_', '-')} must be positive, got {value}")


def _demo(args: argparse.Namespace) -> None:
    from pgolf import config, demo, recipes

    demo.run(args.out, config.override(recipes.get("demo"), args.assignments))


def _data(args: argparse.Namespace) -> None:
    from pgolf import console
    from pgolf.data import audit, build, sources
    from pgolf.data.tokenizer import Tokenizer, train_tokenizer
    from pgolf.files import write_bytes
    from pgolf.pipeline import TOKENIZER

    if args.action == "audit":
        overlap = audit.overlap(args.data)
        console.say(
            f"{overlap.shared} of {overlap.val_documents:,} validation documents occur among "
            f"{overlap.train_documents:,} training documents"
        )
        if overlap.shared:
            raise PgolfError(f"{args.data}: validation text is in the training shards; build both from one stream")
    elif args.action == "tokenizer":
        reader = sources.Reader(args.inputs, args.field)
        train_tokenizer((text for _, text in reader), args.out, args.vocab_size, args.setting)
        console.say(f"{args.out}: {args.vocab_size} tokens, {args.setting}, sha256 {Tokenizer.load(args.out).sha256}")
    else:
        with console.Bar("build") as bar:
            manifest = build.build(
                args.inputs,
                args.out,
                args.tokenizer,
                split=args.split,
                val_docs=args.val_docs,
                shard_tokens=args.shard_tokens,
                workers=args.workers,
                field=args.field,
                progress=lambda docs, tokens, share: bar.update(share, f"{docs:,} documents, {tokens:,} tokens"),
            )
        write_bytes(args.out / TOKENIZER, args.tokenizer.read_bytes())
        console.say(json.dumps(manifest["splits"], indent=2))


def _train(args: argparse.Namespace) -> None:
    from pgolf import config, pipeline, recipes

    settings = config.override(recipes.get(args.recipe), args.assignments)
    pipeline.train(settings, args.data, args.out, _device(args.device), args.resume, args.stop_after)


def _quantize(args: argparse.Namespace) -> None:
    from pgolf import config, pipeline

    budget = [] if args.budget is None else [f"quantize.budget={args.budget}"]
    change = lambda settings: config.override(settings, budget + args.assignments)  # noqa: E731
    pipeline.quantize(args.run, args.data, _device(args.device), change)


def _eval(args: argparse.Namespace) -> None:
    import torch

    from pgolf import config, pipeline, train

    device = _device(args.device)
    run = args.path if args.path.is_dir() else None
    if args.weights:
        if run is None:
            raise PgolfError(f"--weights needs a run folder, got {args.path}")
        model, settings = pipeline.averaged_model(run, device)
        pipeline.check_tokenizer(run, args.data, pipeline.check_data(args.data, settings.model.vocab_size))
        settings = config.override(settings, args.assignments)
        model.dtype = train.compute_dtype(settings, device)
        stage = "weights"
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        loaded = pipeline.load_artifact(_artifact_path(args.path), args.data, device, dtype)
        model = loaded.model
        settings = config.Config(seed=loaded.seed, model=model.config, eval=loaded.eval, ttt=loaded.ttt)
        settings = config.override(settings, args.assignments)
        model.dtype = train.compute_dtype(settings, device)
        stage = "artifact"
    adapt = settings.ttt if args.ttt and settings.ttt.enabled else None
    result = pipeline.evaluate(model, args.data, settings.eval, adapt, settings.seed, args.docs)
    pipeline.report(run, f"{stage}{' with test-time training' if adapt else ''}", result)


def _tune_ttt(args: argparse.Namespace) -> None:
    from pgolf.tuning import command

    path = _artifact_path(args.path)
    out = args.out or path.parent / "tune-ttt"
    command.run(
        path, args.data, out, _device(args.device), args.assignments, args.budget, args.targets, args.docs, args.trials
    )


def _run(args: argparse.Namespace) -> None:
    _train(args)
    from pgolf import config, pipeline, recipes

    device = _device(args.device)
    settings = config.override(recipes.get(args.recipe), args.assignments)
    pipeline.score_run(settings, args.data, args.out, device, args.docs)


def _generate(args: argparse.Namespace) -> None:
    from pgolf import generate, loading
    from pgolf.data.tokenizer import Tokenizer

    path = _artifact_path(args.path)
    tokenizer = Tokenizer.load(args.tokenizer or path.parent / "tokenizer.model")
    loaded = loading.load(path, _device(args.device))
    if loaded.tokenizer_sha256 and loaded.tokenizer_sha256 != tokenizer.sha256:
        raise PgolfError(f"the tokenizer is not the one {path} was trained with; name that one with --tokenizer")
    if tokenizer.vocab_size != loaded.model.config.vocab_size:
        raise PgolfError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {loaded.model.config.vocab_size}")
    if args.tokens < 0 or args.temperature < 0 or args.top_k < 0:
        raise PgolfError("--tokens, --temperature and --top-k must not be negative")
    limit = loaded.eval.context
    print(
        generate.sample(
            loaded.model, tokenizer, args.prompt, args.tokens, args.temperature, args.top_k, limit, args.seed
        )
    )


def _inspect(args: argparse.Namespace) -> None:
    from pgolf import inspection

    inspection.run(_artifact_path(args.path), args.json, args.plot, args.what_if)


def _doctor(args: argparse.Namespace) -> None:
    from pgolf import console, doctor

    for what, found in doctor.report():
        console.say(f"{what:<24} {found}")


def _complain(text: str) -> None:
    """Print why a command ends, once for all ranks that find the same."""
    if "torch" not in sys.modules and "RANK" not in os.environ:  # alone, and without the seconds that torch takes
        print(f"pgolf: {text}", file=sys.stderr)
        return
    from pgolf import parallel

    parallel.complain(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a mistake that the printed line explains, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The settings table needs torch-free imports only, but is built only when somebody asks for help.
    args = _parser(with_settings="--help" in arguments or "-h" in arguments).parse_args(arguments)
    handlers = {
        "demo": _demo,
        "data": _data,
        "train": _train,
        "quantize": _quantize,
        "eval": _eval,
        "tune-ttt": _tune_ttt,
        "run": _run,
        "generate": _generate,
        "inspect": _inspect,
        "doctor": _doctor,
    }
    from pgolf.interrupt import Stopped

    code = 0
    try:
        _check_numbers(args)
        handlers[args.command](args)
    except PgolfError as error:
        _complain(str(error))
        code = 2
    except Stopped as stopped:
        _complain(str(stopped))
        code = INTERRUPTED
    except KeyboardInterrupt:
        _complain("interrupted")
        code = INTERRUPTED
    if "torch" not in sys.modules:
        return code
    from pgolf import parallel

    return parallel.leave(code)
