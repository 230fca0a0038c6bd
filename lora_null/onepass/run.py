"""One pass over the layers: run, sum, solve, write, drop; interrupted anywhere it goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.files import check_target
from ..adapters.fresh import fresh_adapter, starting_delta
from ..adapters.layer import refuse_adapted, require_adaptable
from ..adapters.start import require_these_weights, start_factors
from ..adapters.state import AdapterState
from ..calibration.batches import Batch
from ..calibration.calibrate import check_counts, provenance
from ..calibration.checkpoint import Checkpoint
from ..calibration.collector import Collector
from ..calibration.job import Job, Sums
from ..calibration.layerwise import Finished, read_all, taken, walk_layers
from ..calibration.memory_plan import ExpertsOnMeta
from ..calibration.options import Options
from ..calibration.walk import decoder_layers, split_by_layer
from ..config import ALL_LINEAR, LoraNullConfig
from ..covariances.covariances import Covariances
from ..covariances.covariances import check_target as check_covariances
from ..covariances.packed import DenseMatrices, PackedMemory
from ..models.identity import digest_of, fingerprint_of, sample_of
from ..models.loading import empty_model
from ..models.modes import evaluating
from ..models.refusals import Target
from ..models.settings import Loading
from ..models.shards import DiskWeights, Shards, weight_files
from ..models.targets import survey
from ..models.zero_points import with_group_size
from ..system.distributed import OtherProcessFailed, announcing_failure, exchange, in_first_process, rank_and_size
from ..system.files import beside, read_json, replacing, write_json
from ..system.log import logger
from ..system.memory import give_back
from ..system.version import __version__
from .hidden import HiddenFiles
from .layers import LayerFacts, LayerFiles
from .plan import OnePassPlan, plan_one_pass
from .walk import DiskWalk, input_embedding, outside_of


@dataclass
class OnePass:
    """A run, checked and planned, on which nothing is written yet; made by :meth:`of`.

    Attributes:
        model: On the device meta, with buffers in place.
        targets: What gets adapters.
        layers: Name and members of its list of layers, up to the last that gets adapters.
        members: The targets in each of them.
        plan: What the run takes.
        solver: Options of :func:`lora_null.adapters.start.start_factors`.
        keep: File for the covariances.
    """

    model: nn.Module
    config: LoraNullConfig
    job: Job
    targets: Mapping[str, Target]
    batches: list[Batch]
    collector: Collector
    data: str
    weights: DiskWeights
    layers: tuple[str, list[nn.Module]]
    members: list[dict[str, nn.Linear]]
    plan: OnePassPlan
    solver: dict[str, Any]
    keep: Path | None

    @classmethod
    def of(
        cls,
        model: str,
        batches: Callable[[nn.Module], Any],
        config: LoraNullConfig,
        options: Options,
        loading: Loading,
        *,
        task: Covariances | None = None,
        method: str = "auto",
        keep_covariances: Path | None = None,
        verify_base: bool = True,
    ) -> OnePass:
        """Find layers, weights and batches, and plan; what can be refused is refused here.

        Args:
            model: A folder or a Hugging Face model id.
            batches: Returns an iterable of batches for the model, which is on meta.
            config: Of the adapters.
            options: Of the calibration; its device is where a layer runs.
            loading: How the model would be loaded.
            task: Covariances of the task's text.
            method: Of the null spaces.
            keep_covariances: File for the covariances.
            verify_base: Refuse a task's covariances of other weights.
        """
        if config.modules_to_save:
            raise ValueError(
                f"modules_to_save is {config.modules_to_save!r}: such modules go into the adapter's file whole; "
                "expected none here. Use lora_null.calibrate and lora_null.initialize on the model in memory."
            )
        if config.target_parameters:
            raise ValueError(
                f"target_parameters is {config.target_parameters!r}; expected None here, where experts get no adapter. "
                "Use lora_null.calibrate and lora_null.peft.initialize_lora_null_weights on the model in memory."
            )
        shards = Shards(weight_files(model, loading))
        hollow, outline = (empty_model(model, loading, shards.dtype, buffers=wish) for wish in (True, False))
        found = survey(hollow)
        refuse_adapted(found.linears)
        targets = found.select(config)
        require_adaptable(targets)
        config = with_group_size(config, targets)
        for name, target in targets.items():
            target.require_rank(config.rank_of(name), config.group_pooling)
            if config.train == "ab":
                target.require_writable("freeze_a=False")
        job = replace(Job.of(hollow, config, options), inputs_to=torch.device(options.device or "cpu"))
        name, layers = decoder_layers(hollow, job.linears)
        members, outside = split_by_layer(job.linears, name, len(layers))
        if outside:
            raise ValueError(
                f"{len(outside)} target layers lie outside of {name}, for instance {next(iter(outside))}; expected all "
                "in this list of layers, to be read one at a time. Leave them out through target_modules or "
                "exclude_modules, or use lora_null.calibrate and lora_null.initialize on the model in memory."
            )
        # behind the last layer that gets adapters nothing has to run
        count = max(number for number, linears in enumerate(members) if linears) + 1
        layers, members = layers[:count], members[:count]
        weights = DiskWeights(hollow, shards, torch.device(options.device or "cpu"))
        embedding = input_embedding(hollow)
        wanted = [(n, m) for n, m in outside_of(hollow, name) if m is embedding]
        weights.require([*wanted, *((f"{name}.{i}", layer) for i, layer in enumerate(layers))])
        if task is not None and verify_base:
            require_these_weights(found.linears, task, ("{}",), "task covariances", weights.fingerprint)
        read, collector, data = read_all(job, batches(hollow))
        rank, size = rank_and_size()
        if size > 1 and not any(batch.tokens for batch in read):
            raise ValueError(
                f"Process {rank} of {size} has no batch with tokens; expected at least one for each process. Pass "
                "smaller batches, or start fewer processes."
            )
        with evaluating(outline), ExpertsOnMeta():
            plan, seen = plan_one_pass(
                Job.of(outline, config, options), read, config, name, layers, torch.get_num_threads()
            )
        collector.left_out.update(seen.left_out)
        return cls(
            model=hollow,
            config=config,
            job=job,
            targets=targets,
            batches=read,
            collector=collector,
            data=digest_of(exchange(data)),
            weights=weights,
            layers=(name, layers),
            members=members,
            plan=plan,
            solver={"task": task, "method": method},
            keep=keep_covariances,
        )

    def run(self, output: Path, *, overwrite: bool) -> None:
        """Do it, and write the adapter folder ``output``."""
        with announcing_failure():
            self._run(output, overwrite)

    def _run(self, output: Path, overwrite: bool) -> None:
        if self.keep is not None and self.keep.resolve() == output.resolve():
            raise ValueError(
                f"keep_covariances and the output are both {output}; expected a file for the covariances beside the "
                "adapter's folder. Name another path."
            )
        logger.info("%s", self.plan)
        remedy = "Pass smaller batches, fewer target_modules, or another device."
        self.plan.check(self.job.options.memory_limit, remedy)
        with self._work(output, overwrite) as work, evaluating(self.model), torch.inference_mode(False):
            files, total = LayerFiles(work), len(self.members)
            done = exchange(min(files.count(), total))[0]
            if done < total:
                self._walk(work, files, done)
            in_first_process(lambda: self._write(work, files, output, overwrite))

    @contextmanager
    def _work(self, output: Path, overwrite: bool) -> Iterator[Path]:
        """Hold this process's folder of work beside ``output``, and remove it at the end; a killed run leaves it."""
        rank = rank_and_size()[0]
        own = output if rank == 0 else output.with_name(f"{output.name}.rank{rank}")
        work, finished = beside(own, "work"), beside(own, "done")
        checkpoint = Checkpoint(work, self._key())
        with Checkpoint(own, {}).locked():
            shutil.rmtree(finished, ignore_errors=True)
            if (work / "key.json").exists():
                checkpoint.refuse_other({k: str(v) for k, v in read_json(work / "key.json").items()}, checkpoint.key)
            else:
                shutil.rmtree(work, ignore_errors=True)
            if rank == 0 and not (work / "adapter").exists():
                check_target(output, overwrite)
            if rank == 0 and self.keep is not None and not (work / "kept").exists():
                check_covariances(self.keep, overwrite)
            # nothing is written before all have found their part in order
            exchange(None)
            work.mkdir(parents=True, exist_ok=True)
            with replacing(work / "key.json") as temporary:
                write_json(temporary, checkpoint.key)
            yield work
            # in one step, so that what says that the outputs are whole never lacks while the rest is there
            os.replace(work, finished)
            shutil.rmtree(finished, ignore_errors=True)

    def _key(self) -> dict[str, str]:
        """Return what decides the bits of the result."""
        task: Covariances | None = self.solver["task"]
        facts = [] if task is None else [*(f"{k}={v}" for k, v in task.metadata.items()), str(task.tokens)]
        return {
            "version": __version__,
            "model": self.weights.shards.key(),
            "dtype": ",".join(sorted({str(parameter.dtype) for parameter in self.model.parameters()})),
            "device": str(self.weights.device),
            "targets": digest_of(self.job.linears),
            **self.job.options.key(),
            "data": self.data,
            "config": json.dumps(self.config.to_dict(), sort_keys=True),
            "method": self.solver["method"],
            "task": digest_of(facts),
            "keep_covariances": str(self.keep is not None),
            "process": "{} of {}".format(*rank_and_size()),
        }

    def _walk(self, work: Path, files: LayerFiles, done: int) -> None:
        name, layers = self.layers
        walk = DiskWalk(self.model, name, layers, self.batches, self.weights, HiddenFiles(work, done))
        parts = Checkpoint(work / "covariances", self._key())

        def finish(number: int) -> None:
            state, matrices = taken(self.collector)
            give_back()
            if self.keep is not None and rank_and_size()[0] == 0:
                parts.part(number).save(state, DenseMatrices(matrices))
            try:
                deltas, facts = self._solved(number, Covariances(matrices, state.groups, state.tokens))
            except (ValueError, OtherProcessFailed) as error:
                # The same arguments would be refused again, and mended ones must not be refused for what lies here.
                if getattr(error, "refused", True):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            # Hidden states are replaced when the layer that they went through is on the disk, and not before.
            in_first_process(lambda: files.write(number, deltas, facts))
            del matrices
            give_back()

        passes = (len(layers) - walk.start) * len(self.batches)
        with self.job.bar(passes, unit="layer batch") as advance:
            walk_layers(walk, self.collector, self.members, finish, done=done, advance=advance)

    def _solved(self, number: int, covariances: Covariances) -> tuple[Mapping[str, tuple[Tensor, Tensor]], LayerFacts]:
        """Return the adapters of a layer, whose weights are in place, from its covariances."""
        members = self.members[number]
        left_out = {name: reason for name, reason in self.collector.left_out.items() if name in members}
        facts = LayerFacts(
            groups={key: list(names) for key, names in covariances.groups.items()},
            tokens=covariances.tokens,
            sizes={key: covariances.size(key) for key in covariances},
            samples={name: (sample_of(name, members[name]) or b"").hex() for name in members if name in covariances},
            left_out=left_out,
        )
        # a layer that got no token is refused if it was wished for by name
        wished = [name for name in members if name in covariances or self.config.target_modules != ALL_LINEAR]
        if not wished:
            return {}, facts
        start = start_factors(
            {name: self.targets[name] for name in members},
            {name: self.config.rank_of(name) for name in wished},
            covariances,
            self.config,
            progress=False,
            **self.solver,
        )
        facts.energies, facts.free = start.energies, start.free
        state = AdapterState(self.config)
        return {name: starting_delta(name, start, state) for name in wished}, facts

    def _write(self, work: Path, files: LayerFiles, output: Path, overwrite: bool) -> None:
        deltas: dict[str, tuple[Tensor, Tensor]] = {}
        facts = LayerFacts()
        for number in range(len(self.members)):
            own, each = files.read(number)
            deltas.update(own)
            facts.add(each)
        order = {name: i for i, name in enumerate(self.job.linears)}
        groups = {key: facts.groups[key] for key in sorted(facts.groups, key=order.__getitem__)}
        called = {name for names in groups.values() for name in names}
        check_counts(facts.tokens, facts.sizes, called, self.job.linears, facts.left_out)
        if self.keep is not None:
            base = fingerprint_of(bytes.fromhex(facts.samples[name]) for name in self.job.linears if name in called)
            kept = Finished()
            parts = Checkpoint(work / "covariances", self._key())
            for number in range(len(self.members)):
                loaded = parts.part(number).load(self.collector.widths)
                assert loaded is not None
                kept.add(*loaded)
            matrices = PackedMemory({key: kept.triangles[key] for key in groups}, self.collector.placement.dtype)
            sums = Sums(matrices, groups, facts.tokens, self.data, facts.left_out)
            found = Covariances(matrices, groups, facts.tokens, provenance(self.job, self.config, sums, base))
            _once(work / "kept", self.keep, overwrite, lambda path: found.save(path, overwrite=overwrite))
        names = [name for name in self.job.linears if name in deltas]
        own_print = fingerprint_of(bytes.fromhex(facts.samples[name]) for name in names)
        state = AdapterState(self.config, own_print, facts.energies, free=facts.free)
        adapter = fresh_adapter(self.model, {name: deltas[name] for name in names}, state)
        _once(work / "adapter", output, overwrite, lambda path: adapter.write(path, overwrite=overwrite))


def _once(mark: Path, path: Path, overwrite: bool, write: Callable[[Path], Any]) -> None:
    """Write ``path``, unless this run was killed just after it had done so: what is there then is whole."""
    if mark.exists() and path.exists() and not overwrite:
        return
    mark.touch()
    write(path)
