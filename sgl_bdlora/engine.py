"""SGLang's offline engine with block-diagonal LoRA."""

from sgl_bdlora import config, cpu, defaults

cpu.prepare_environment()

from sglang.srt.entrypoints import engine  # noqa: E402


class Engine(engine.Engine):
    """`sglang.Engine` with LoRA enabled on the bdlora back end.

    Takes sglang.Engine's arguments (fields of ServerArgs) and those of `config.Options` by name; whatever the caller gives wins. What one
    engine was given holds for no later one.
    """

    def __init__(self, **kwargs):
        own = {name: kwargs.pop(name) for name in config.names() & kwargs.keys()}
        config.publish_for_engine(**own)
        if "server_args" not in kwargs:
            kwargs = {**defaults.fields(kwargs), **kwargs}
        super().__init__(**kwargs)
