"""Launch arguments that a CPU-only server needs and the user did not give."""

from collections.abc import Mapping

from sgl_bdlora.cpu.detect import applies

# Field of SGLang's ServerArgs -> value. Each can be overridden by giving the argument.
DEFAULTS: dict[str, object] = {
    "device": "cpu",
    # The only attention back end that needs no kernel package.
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_custom_all_reduce": True,
    # SGLang cannot tell how much memory is each rank's and would take nearly all of it for each rank's key/value cache.
    "max_total_tokens": 32768,
    "max_running_requests": 64,
    # A scheduler that polls takes a core from the ranks that compute.
    "sleep_on_idle": True,
    # There is no stream to overlap with: the overlap thread only adds synchronisation.
    "disable_overlap_schedule": True,
}


def default_fields(given: Mapping[str, object]) -> dict[str, object]:
    """The fields that a CPU needs, less those in *given*; none where `applies()` is false."""
    if not applies():
        return {}
    return {field: value for field, value in DEFAULTS.items() if field not in given}
