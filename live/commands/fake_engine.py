"""``qlm-live fake-engine``: a process that answers as a vLLM server does, at a hardware profile's speed."""

from argparse import Namespace

from qlm_sim.cli.parser import Commands

_EXAMPLES = """examples:
  qlm-live fake-engine llama-2-7b --port 8101
  qlm-live fake-engine mistral-7b --port 8102 --gpu A10 --speed 10

In a configuration, started and watched by the gateway:
  [[engine]]
  id = "gpu-0"
  models = ["llama-2-7b"]
  command = ["qlm-live", "fake-engine", "{name}", "--port", "{port}"]
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "fake-engine",
        help="a fake vLLM server, to try things out",
        description="Answer as a vLLM server does, at the speed that a hardware profile promises.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("model", help="a model that qlm-sim profile list knows, or a config.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", help="what clients call it; the model's name if not given")
    parser.add_argument("--gpu", default="A100-80", help="hardware profile (%(default)s)")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="times faster than the profile (%(default)s)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="most sequences at once (%(default)s)")
    parser.add_argument(
        "--mean-output-tokens", type=float, default=128.0, help="mean length of answers (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    import asyncio

    from live.fake.engine import FakeEngine
    from live.fake.serve import serve_forever
    from live.serving import fast_loop
    from qlm_sim.errors import InputError
    from qlm_sim.models.deployment import deploy
    from qlm_sim.models.engine_config import EngineConfig
    from qlm_sim.models.engines import DEFAULT_ENGINE
    from qlm_sim.models.hardware import load_gpu
    from qlm_sim.models.specs import load_model

    for flag, value in (
        ("--speed", args.speed),
        ("--max-num-seqs", args.max_num_seqs),
        ("--mean-output-tokens", args.mean_output_tokens),
    ):
        if not 0 < value < float("inf"):
            raise InputError(f"{flag}: found {value:g}, expected a number above 0")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port: found {args.port}, expected a whole number from 0 to 65535")
    config = EngineConfig(max_num_seqs=args.max_num_seqs)
    profile = deploy(
        load_model(args.model), load_gpu(args.gpu), 1, config, engine=DEFAULT_ENGINE, storage_bytes_per_s=2e9
    )
    name = args.served_model_name or args.model
    engine = FakeEngine(
        name, profile, config, time_scale=1 / args.speed, mean_output_tokens=args.mean_output_tokens
    )
    try:
        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            runner.run(serve_forever(engine, args.host, args.port, name))
    except OSError as error:
        raise InputError(f"--host, --port: {args.host}:{args.port}: {error.strerror}") from None
    return 0
