"""Launch arguments that our launcher and engine add where the user said nothing."""

from collections.abc import Mapping

from sgl_bdlora import config, cpu


def fields(given: Mapping[str, object]) -> dict[str, object]:
    """Fields of SGLang's ServerArgs with our defaults, less those in `given`."""
    wanted: dict[str, object] = {"enable_lora": True, "lora_backend": config.BACKEND, **cpu.default_fields({})}
    return {field: value for field, value in wanted.items() if field not in given}


def arguments(argv: list[str]) -> list[str]:
    """The same for a command line: what to append to `argv`."""
    return as_flags(fields(given_fields(argv)))


def given_fields(argv: list[str]) -> dict[str, str]:
    """ServerArgs field -> the word after its flag in `argv`, or in the YAML file that `--config` names there, where the file counts less.

    Raises ValueError or OSError for a file that SGLang could not read either.
    """
    if "--config" in argv:
        from sglang.srt.server_args_config_parser import ConfigArgumentMerger

        # Made without the parser it keeps a flag that the file sets to false, which has been given too.
        argv = ConfigArgumentMerger().merge_config_with_args(argv)
    given = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else following
    return given


def as_flags(fields: Mapping[str, object]) -> list[str]:
    """ServerArgs fields as command-line words; True is a bare flag."""
    words = []
    for field, value in fields.items():
        flag = "--" + field.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words
