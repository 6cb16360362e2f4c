"""The LoRA manager of one rank: puts LoRA into the model's layers, and prepares each batch.

A subclass of SGLang's LoRAManager: the model runner, the scheduler and the CUDA graph runners keep talking to the interface they
know (sglang/srt/lora/lora_manager.py); what an adapter is and where its weights lie is ours. How adapters are loaded: loader.py.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

from sgl_bdlora import config, graphs
from sgl_bdlora.admission import Admission, Waiting
from sgl_bdlora.layers import embedding
from sgl_bdlora.layers.host import host_layers, vocabulary_layers
from sgl_bdlora.layers.linear import LoRALinearMethod
from sgl_bdlora.loader import AdapterLoader
from sgl_bdlora.memory_pool import MemoryPool, Resident
from sgl_bdlora.metrics import engines
from sgl_bdlora.preparing import BEGIN, POLL
from sgl_bdlora.sharding import AdapterShard, HostModel

logger = logging.getLogger(__name__)


class BDLoRAManager(LoRAManager):
    """Serves block-diagonal and plain adapters of any ranks in one batch; only S-LoRA pieces meet in a collective."""

    def init_state(self, max_lora_rank=None, target_modules=None, lora_paths=None) -> None:
        """Wrap the model's layers, make the pool, load the adapters given at start."""
        options = config.options()
        refuse_padded_model(self.base_hf_config, self.tp_size)
        self.max_lora_rank = max_lora_rank or config.DEFAULT_MAX_RANK
        self.sharding = options.lora_sharding
        self.last_used: dict[str, float] = {}
        # loads, load_failures and unloads since the start.
        self.counts: Counter[str] = Counter()
        self._published = (0, 0)
        # What the last fetch_new_loras made resident, and what the last decode step was of, each with the pool's `changes`.
        self._fetched: tuple[set[str], int] | None = None
        self._prepared: tuple[tuple[str | None, ...], int] | None = None
        self.target_modules = None if not target_modules or "all" in target_modules else set(target_modules)

        linear = []
        for host, module in list(host_layers(self.base_model, self.target_modules)):
            module.quant_method = LoRALinearMethod(module.quant_method, self.lora_backend, host.path)
            linear.append(host)
        hosts = list(linear)
        tied = bool(getattr(self.base_hf_config.get_text_config(), "tie_word_embeddings", False))
        for host, module in vocabulary_layers(self.base_model, tied, self.target_modules):
            embedding.wrap(module, host, self.lora_backend)
            hosts.append(host)
        self.host = HostModel(hosts)
        self.memory_pool = MemoryPool(options.lora_pool_bytes, self.dtype, self.device, self.max_loras_per_batch)
        self.loader = AdapterLoader(
            self.memory_pool, self.host, self.sharding, self.max_lora_rank, self.lora_backend, self.all_ranks
        )
        self.shards, self.lora_refs = self.loader.shards, self.loader.refs
        self.admission = Admission(self.memory_pool, self.shards, self.loader.pinned)
        combines = self.sharding == "s-lora" and self.tp_size > 1
        # The default limit says nothing about the ranks that will come.
        expected = self.max_lora_rank if self.max_lora_rank < config.DEFAULT_MAX_RANK else 0
        self.lora_backend.attach(self.memory_pool.arena, linear, combines, expected)

        for ref in lora_paths or []:
            result = self.load_lora_adapter(ref)
            if not result.success:
                raise SystemExit(f"sgl-bdlora: cannot start: {result.error_message}")
        # Nothing may be asked of CUDA beside the capture of graphs, which comes next.
        self.loader.settle()
        if self.tp_rank == 0:
            logger.info(
                "sgl-bdlora: %d layers take LoRA, %.2f GiB per rank for adapter weights, %d adapters loaded",
                len(hosts),
                self.memory_pool.budget / 2**30,
                len(self.shards),
            )
        engines.publish(self)

    # Loading and unloading

    def load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """Read, check and shard an adapter; or only prepare that, where the launcher says so (preparing.py).

        SGLang's own empties PyTorch's cache of device memory before and after, for a line of its log: batches would wait for that.
        """
        name, path, uid = lora_ref.lora_name, lora_ref.lora_path, lora_ref.lora_id
        if uid.startswith((BEGIN, POLL)):
            return self.create_lora_update_result(success=self.loader.preparations.ask(uid, name, path))
        logger.info("LoRA adapter loading starts: %s.", lora_ref)
        result = self._load_lora_adapter(lora_ref)
        logger.info("LoRA adapter loading completes: %s.", lora_ref)
        return result

    def unload_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """As for load_lora_adapter."""
        result = self._unload_lora_adapter(lora_ref)
        logger.info("LoRA adapter unloaded: %s.", lora_ref)
        return result

    def _load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        return self._load_result(self.loader.load(lora_ref))

    def _load_lora_adapter_from_tensors(
        self, lora_ref: LoRARef, tensors: dict[str, torch.Tensor], config_dict: dict, added_tokens_config=None
    ) -> LoRAUpdateOutput:
        return self._load_result(self.loader.load_tensors(lora_ref, tensors, config_dict))

    def _load_result(self, error: str | None) -> LoRAUpdateOutput:
        self.counts["loads" if error is None else "load_failures"] += 1
        engines.publish(self)
        return self.create_lora_update_result(success=error is None, error_message=error or "")

    def _unload_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        if not self.loader.unload(lora_ref.lora_id):
            return self.create_lora_update_result(
                success=False, error_message=f"LoRA adapter {lora_ref.lora_name!r} is not loaded."
            )
        self.last_used.pop(lora_ref.lora_id, None)
        self.counts["unloads"] += 1
        engines.publish(self)
        return self.create_lora_update_result(success=True)

    def all_ranks(self, mine):
        """Every rank's `mine`, in order of rank."""
        if self.tp_size == 1:
            return [mine]
        everyone: list = [None] * self.tp_size
        torch.distributed.all_gather_object(everyone, mine, group=get_tp_group().cpu_group)
        return everyone

    # Batches

    def next_round(self, running: set[str | None], waiting: Iterable[tuple[str, str | None]]) -> None:
        """Before a scheduling round: see admission.py. waiting: (request id, adapter id); None stands for the base model."""
        entries = (Waiting(request, uid) for request, uid in waiting if uid is not None)
        self.admission.next_round(running - {None}, entries, base_runs=None in running)

    def validate_lora_batch(self, lora_ids: set[str | None]) -> bool:
        """Whether requests for these adapters (None: the base model, which needs no room) fit into one batch beside the pinned ones."""
        return self.admission.fits(lora_ids - {None})

    def fetch_new_loras(self, new_loras: set[str | None], running_loras: frozenset[str | None] = frozenset()) -> None:
        """Make the adapters of the next batch resident."""
        wanted = (new_loras | running_loras) - {None}
        self.last_used.update(dict.fromkeys(wanted, time.time()))
        if self._fetched == (wanted, self.memory_pool.changes):
            return
        self.memory_pool.ensure({uid: self.shards[uid] for uid in sorted(wanted)}, protected=self.loader.pinned())
        self._fetched = wanted, self.memory_pool.changes
        copies = (self.memory_pool.loads, self.memory_pool.evictions)
        if copies != self._published:
            self._published = copies
            engines.publish(self)

    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        """Say which rows belong to which adapter, once for all layers. Most decode steps are of the same requests as the one before."""
        step = None
        if forward_batch.forward_mode.is_decode() and get_capture_lora_variant() not in graphs.WITH_ADAPTERS:
            step = tuple(forward_batch.lora_ids), self.memory_pool.changes
        if step is not None and step == self._prepared:
            self.memory_pool.copies.read_by_current_stream()
            self.lora_backend.repeat_batch()
            return
        self._prepared = None
        self._set_batch(forward_batch)
        self._prepared = step

    def _set_batch(self, forward_batch: ForwardBatch) -> None:
        adapters = [None if uid is None else self._resident(uid) for uid in forward_batch.lora_ids]
        self.memory_pool.copies.read_by_current_stream()
        for resident in {id(a): a for a in adapters if a is not None}.values():
            resident.arrival.wait()
        rows = _rows_per_request(forward_batch)
        self.lora_backend.set_batch(
            adapters,
            rows,
            _head_rows_per_request(forward_batch, rows),
            prefill_graph=self.can_use_prefill_cuda_graph(forward_batch),
        )

    def reset_lora_batch(self) -> None:
        """The next forward pass has no rows."""
        self._prepared = None
        super().reset_lora_batch()

    def can_use_prefill_cuda_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a prefill graph may run this batch; SGLang asks again before it replays one."""
        if not super().can_use_prefill_cuda_graph(forward_batch):
            return False
        return self.lora_backend.prefills_from_graph(
            [None if uid is None else self._resident(uid) for uid in forward_batch.lora_ids]
        )

    def _resident(self, uid: str) -> Resident:
        resident = self.memory_pool.get(uid)
        if resident is None:
            # Going on would answer with the base model under the adapter's name.
            raise RuntimeError(f"sgl-bdlora: adapter id {uid} of the batch is not resident")
        return resident

    def resident(self) -> Iterator[tuple[LoRARef, AdapterShard]]:
        """The adapters that are in the pool."""
        for uid, shard in self.shards.items():
            if self.memory_pool.get(uid) is not None:
                yield self.lora_refs[uid], shard


def _rows_per_request(forward_batch: ForwardBatch) -> list[int]:
    mode = forward_batch.forward_mode
    if mode.is_target_verify():
        return [forward_batch.spec_info.draft_token_num] * forward_batch.batch_size
    if mode.is_extend():
        return list(forward_batch.extend_seq_lens_cpu)
    return [1] * forward_batch.batch_size


def _head_rows_per_request(forward_batch: ForwardBatch, rows: list[int]) -> list[int]:
    """How many of each request's rows reach lm_head, as logits_processor.py:_get_pruned_states chooses them."""
    mode = forward_batch.forward_mode
    if not mode.is_extend() or mode.is_target_verify():
        return rows
    if not forward_batch.return_logprob:
        return [1] * len(rows)
    starts = forward_batch.extend_logprob_start_lens_cpu
    return [max(1, length - start) for length, start in zip(rows, starts, strict=True)]


def refuse_padded_model(hf_config, tp_size: int) -> None:
    """End the process when SGLang padded the model to make it divisible (update_config.py, on CPUs): adapters would not fit it."""
    for name, original in vars(hf_config).items():
        field = name.removeprefix("original_").replace("total_num_kv_heads", "num_key_value_heads")
        if name.startswith("original_") and getattr(hf_config, field, original) != original:
            raise SystemExit(
                f"sgl-bdlora: {field} = {original} is not divisible by --tp-size {tp_size}. Choose a tensor-parallel size that "
                "divides the model."
            )
