"""Plausible bugs: each is a text of the package that stands there once, another in its place, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCHEDULES = "laws/test_every_schedule.py"
METHODS = "laws/test_every_aggregator.py"
WINDOWS = "laws/test_windows.py"
LIFTED = "laws/test_lifted_answers.py"
DEPTHS = "laws/test_every_depth.py"
TREES = "laws/test_every_tree.py"
REGROUPED = "laws/test_regrouped_tree.py"
EDGES = "hierarchy/test_tree.py"


@dataclass(frozen=True)
class Mutant:
    """A replacement somewhere in the package, and the test that must notice (a path or node id below `tests/`)."""

    bug: str
    old: str
    new: str
    test: str

    def places(self, package: Path) -> list[Path]:
        """Files that hold the old text, one for each time that it stands there."""
        files = [(path, path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))]
        return [path for path, text in files for _ in range(text.count(self.old))]

    def apply(self, package: Path) -> None:
        """Put the bug into this copy of the package."""
        (path,) = self.places(package)
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


CANARIES = "core/test_canary.py"
PRIVATE = "privacy/test_private_merge.py"
RECORDS = "privacy/test_record_draws.py"
SUMMED = "hierarchy/test_secure_edge.py"
SUMS = "laws/test_every_sum.py"
MASKED = "privacy/secure_sum/test_member.py"
MEMBERS = "deploy/site/test_sum_member.py"
LEDGERS = "privacy/test_ledger.py"
STATES = "simulate/test_client_states.py"
MUTANTS = [
    Mutant(
        "a release leaves before its line is on the disk",
        "            os.fsync(descriptor)\n        except BaseException:",
        "        except BaseException:",
        LEDGERS,
    ),
    Mutant(
        "only the last release of a client counts",
        "self.spent[unit] = merged_events((*self.spent.get(unit, ()), event))",
        "self.spent[unit] = merged_events((event,))",
        LEDGERS,
    ),
    Mutant(
        "a version that came out otherwise after a crash is taken for the same",
        "        return _digest(_encode(entry)) in self.written",
        "        return any(unit in self.spent for unit in entry.events)",
        LEDGERS,
    ),
    Mutant(
        "several answers of a client cost what the largest costs",
        "total = math.sqrt(math.fsum(squares))",
        "total = math.sqrt(max(squares, default=0.0))",
        "privacy/test_accounting.py",
    ),
    Mutant(
        "a client's change is cut to the clip in each layer, and not in all together",
        "length = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in change.values()))",
        "length = max((float(torch.linalg.vector_norm(tensor)) for tensor in change.values()), default=0.0)",
        PRIVATE,
    ),
    Mutant(
        "a site's noise is the same whatever its multiplier, so two answers give the exact one",
        "names = (task, self.request, fingerprint(exact), clip.hex(), multiplier.hex())",
        "names = (task, self.request, fingerprint(exact))",
        "deploy/site/test_site_noise.py",
    ),
    Mutant(
        "after a crash an answer is merged that may have been released",
        "        if too_many or participation.apart > 1:",
        "        if participation.apart > 1:",
        "core/test_participation.py",
    ),
    Mutant(
        "a member opens a sum over survivors that too few have signed",
        "self._require_enough(len(agreements.signatures), len(self._offers))",
        "self._require_enough(len(self._survivors), len(self._offers))",
        MASKED,
    ),
    Mutant(
        "a member opens both secrets of another one",
        "for peer, shares in self._held.items() if peer not in survivors}",
        "for peer, shares in self._held.items()}",
        MASKED,
    ),
    Mutant(
        "a sum goes on with fewer of one start than the least number",
        "if counts[start] >= self.least)",
        "if counts[start])",
        MASKED,
    ),
    Mutant(
        "a server may ask members for different directions in one round",
        'f"{start_digest(start)} {first} {last}"',
        'f"{start_digest(start)}"',
        MEMBERS,
    ),
    Mutant(
        "a server may choose how many members must agree to an opening",
        "if terms.threshold < run.sum_threshold:",
        "if not terms.threshold:",
        MEMBERS,
    ),
    Mutant(
        "after a restart a site gives the numbers of a task to a second sum",
        "if (request.terms.run_hash, request.task) in record.counts.summed:",
        "if (request.terms.run_hash, request.task) in self.rounds:",
        MEMBERS,
    ),
    Mutant(
        "where sums were agreed on, a site sends a single answer",
        "and isinstance(start.codec, Summed) != bool(terms.least_sum):",
        "and isinstance(start.codec, Summed) > bool(terms.least_sum):",
        "deploy/site/test_limits.py",
    ),
    Mutant(
        "directions that one member alone holds are opened",
        "if len(holders) >= least:",
        "if holders:",
        SUMMED,
    ),
    Mutant(
        "the sum of a block is divided by all members, and not by those who hold it",
        "share = step / held[: one.rank]",
        "share = step / torch.full_like(held[: one.rank], members)",
        SUMS,
    ),
    Mutant(
        "each member of a group that is summed gets new directions of its own",
        "name: revive(factor, factor.rank, derive(model.basis, name))",
        "name: revive(factor, factor.rank, derive(seed, name))",
        SUMS,
    ),
    Mutant(
        "what a member sent is taken out of a sum that was opened with it",
        "case ClientLost(client) if client in self._being_summed():",
        "case ClientLost(client) if not client:",
        SUMMED,
    ),
    Mutant(
        "rows share their coins: a step takes all of them or none",
        "(coins < int(rate * COIN)).nonzero()",
        "(coins[:1].expand(rows) < int(rate * COIN)).nonzero()",
        RECORDS,
    ),
    Mutant(
        "noise of a step follows from its place alone, and two answers to one place tell their difference",
        "noise.normals(clipped, noise.digest(clipped, deviation.hex(), grid.hex()))",
        "noise.normals(clipped)",
        RECORDS,
    ),
    Mutant(
        "each tensor of an example is cut by itself, so that an example adds more than the clip",
        "name: (shares @ row[finite].to(shares.dtype))",
        "name: ((clip / row[finite].double().norm(dim=1)).clamp(max=1.0) @ row[finite].to(shares.dtype))",
        "train/engine/test_record_gradients.py",
    ),
    Mutant(
        "what was trained before the owner asked for noise is sent again, and goes on in later answers",
        "if noises else run_hash",
        "if not noises else run_hash",
        "deploy/site/test_site_privacy.py",
    ),
    Mutant(
        "a lost ledger opens the budget again",
        "if lost := {*self.recorded}.difference(",
        "if lost := {*()}.difference(",
        "deploy/site/test_site_privacy.py",
    ),
    Mutant(
        "a moved record lets another request have the coins of one that the ledger knows",
        "return highest == asked or highest[0] < asked[0]",
        "return True",
        "deploy/site/test_site_privacy.py",
    ),
    Mutant(
        "a trial of directions and the steps after it drop the same",
        'random_words(self.secret, "record dropout", self.run, self.task, step, count=',
        'random_words(self.secret, "record dropout", self.run, self.task, 0, count=',
        RECORDS,
    ),
    Mutant(
        "one bit in 64 that decides what dropout drops is always 0",
        "dtype=torch.int64).random_(-(2**63), None)",
        "dtype=torch.int64).random_()",
        "train/engine/test_dropout.py",
    ),
    Mutant(
        "kept activations are thought to be good though the block just below the trained ones has changed",
        "if depths[name] > trained}",
        "if depths[name] > trained + 1}",
        "train/test_evaluate.py::test_kept_layers_that_somebody_changed_are_computed_again",
    ),
    Mutant(
        "activations over blocks that this client's task changed are kept for other runs",
        "None if changed else cache.files",
        "cache.files",
        "train/engine/test_activation_files.py::test_what_others_changed_below_is_not_kept_for_other_runs",
    ),
    Mutant(
        "a text whose segments differ has the same activations",
        "columns = [texts.ids, *(texts.extras[name] for name in sorted(texts.extras))]",
        "columns = [texts.ids]",
        "train/engine/test_activation_files.py::test_a_text_is_found_by_its_tokens_alone",
    ),
    Mutant(
        "an answer that is none of the labels may be counted as chosen",
        "return (wrong == 0) & known.to(wrong.device)",
        "return wrong == 0",
        "train/test_evaluate.py::test_an_answer_that_is_no_label_is_never_chosen_and_earlier_answers_do_not_count",
    ),
    Mutant(
        "a base without dropout switches the adapters' dropout off too",
        'if ".lora_dropout." in name:\n                module.train()',
        'if ".lora_dropout." in name:\n                module.eval()',
        "train/engine/test_dropout.py",
    ),
    Mutant(
        "what is below the trained blocks drops, or nothing above them: the modes of parts are lost",
        "            module.training = training\n",
        "            module.training = model.training\n",
        "train/engine/test_dropout.py",
    ),
    Mutant(
        "what a site has spent in other runs does not count",
        "if reason := _beyond(entries, unit, costs, self.privacy.budget):",
        "if reason := _beyond(entries[:0], unit, costs, self.privacy.budget):",
        "deploy/site/test_site_privacy.py",
    ),
    Mutant(
        "the answers of one client in a merge are noised as if there were one",
        "shares[update.task.client] = shares.get(update.task.client, 0.0) + weight",
        "shares[update.task.client] = weight",
        PRIVATE,
    ),
    Mutant(
        "a method sees the answers beside their noisy sum",
        "unchanged = merge.map_updates(lambda update: replace(update, result=_nothing(update)))",
        "unchanged = merge",
        PRIVATE,
    ),
    Mutant(
        "runs of two multipliers share their noise, which their difference then tells",
        "repr((float(private.clip), float(private.multiplier), float(largest)))",
        "repr((float(private.clip), float(largest)))",
        PRIVATE,
    ),
    Mutant(
        "an answer that waits is not counted, and one too many is merged",
        "if state.merged.get(client, 0) + waiting >= self.most_answers:",
        "if state.merged.get(client, 0) >= self.most_answers:",
        "core/test_participation.py",
    ),
    Mutant(
        "small losses add up: a version is compared with the last one and not with the best of ten",
        "return max(self.scores, key=mean_score, default=())",
        "return self.scores[-1] if self.scores else ()",
        CANARIES,
    ),
    Mutant(
        "an answer that is set aside stays in the window",
        "self.arrived = [update for update, stays in zip(self.arrived, kept, strict=True) if stays]",
        "kept.clear()",
        "laws/test_every_canary.py",
    ),
    Mutant(
        "answers that arrive while a score is outstanding are lost",
        "later, state.retained = state.arrived[trial.seen :], len(merge.retain)",
        "later, state.retained = [], len(merge.retain)",
        CANARIES,
    ),
    Mutant(
        "a site that just undoes what the others bring is never looked for",
        "if without is not None and _harms(",
        "if clearly_better(record.best, trial.whole, margin) and without and _harms(",
        CANARIES,
    ),
    Mutant(
        "a liar that moves far has honest sites set aside, since it counts for more without them",
        " and clearly_better(unchanged, trial.whole, 0.0)",
        "",
        CANARIES,
    ),
    Mutant(
        "answers go before the state of the server from which they are repeated",
        "last = max(earlier)",
        "last = size",
        "runs/test_rollback.py",
    ),
    Mutant(
        "a run that begins from an adapter forgets what its method folded",
        "fold = compact_with_fold(start.rest, model.fold)",
        "fold = start.rest",
        "runs/test_start_adapter.py",
    ),
    Mutant(
        "a run that begins from an adapter of low rank never has a higher one",
        "first[name] = revive(cut_factor(whole, rank), rank, drawn)",
        "first[name] = cut_factor(whole, rank)",
        "runs/test_start_adapter.py",
    ),
    Mutant(
        "anyone may answer a task",
        "client not in state.working or state.working[client][1] != number",
        "number not in state.busy",
        SCHEDULES,
    ),
    Mutant(
        "an answered task stays busy",
        "task = self.state.busy.pop(number)",
        "task = self.state.busy[number]",
        SCHEDULES,
    ),
    Mutant(
        "a rejected answer closes its task",
        "return Reject(client, number, reason)  # the task stays outstanding: a better answer may come",
        "self._release(number)\n                    return Reject(client, number, reason)",
        SCHEDULES,
    ),
    Mutant(
        "a reply is merged again and again",
        "state.arrived = [*merge.retain, *later]",
        "pass",
        SCHEDULES,
    ),
    Mutant(
        "a cancelled client stays busy",
        "Cancel(number, self._release(number).client)",
        "Cancel(number, self.state.busy[number].client)",
        SCHEDULES,
    ),
    Mutant(
        "a task id is used again",
        "number, state.next_task = state.next_task, state.next_task + 1",
        "number = max(state.busy, default=0) + 1",
        SCHEDULES,
    ),
    Mutant(
        "wake in the past",
        "max(time, state.now) for time in times",
        "time for time in times",
        f"{SCHEDULES}::test_a_late_driver_misses_no_deadline",
    ),
    Mutant(
        "a missed deadline is forgotten",
        "(fleet.arrived or due > fleet.now)",
        "due > fleet.now",
        f"{SCHEDULES}::test_a_late_driver_misses_no_deadline",
    ),
    Mutant(
        "a deadline that fires for ever",
        "return due if due is not None and (fleet.arrived or due > fleet.now) else None",
        "return due",
        SCHEDULES,
    ),
    Mutant(
        "what an edge threw away is not said",
        "return [Discarded(one.task.id, one.task.client, reason) for one in server.arrived[server.retained :]]",
        "return []",
        TREES,
    ),
    Mutant(
        "an edge that comes back merges what it said was lost",
        "del state.server.arrived[state.server.retained :]",
        "pass",
        EDGES,
    ),
    Mutant(
        "an edge counts members of earlier tasks",
        "self.state.contributions, self.state.loss, self.state.due = {}, None, None",
        "self.state.loss, self.state.due = None, None",
        TREES,
    ),
    Mutant(
        "edges number their tasks alike",
        "edge.server.number_tasks_from(k * BLOCK + 1)",
        "edge.server.number_tasks_from(1)",
        TREES,
    ),
    Mutant(
        "a report arrives although its task was dropped",
        "if entry[2].task_id != number",
        "if True",
        EDGES,
    ),
    Mutant(
        "an edge without members keeps its task",
        "if not state.server.stopped and state.empty:",
        "if False:",
        TREES,
    ),
    Mutant(
        "a tree forgets what is on its way",
        "times += [self.below.messages[0][0]] if self.below.messages and not self._scoring else []",
        "",
        TREES,
    ),
    Mutant(
        "moments live on into the next task of the edge",
        'basis=f"{outer.id}:{start.basis}"',
        "basis=start.basis",
        TREES,
    ),
    Mutant(
        "members do all steps in every inner round",
        "outer.steps // outer.rounds",
        "outer.steps",
        EDGES,
    ),
    Mutant(
        "weights do not sum to 1",
        "weight / total if total > 0",
        "weight if total > 0",
        "schedule/test_rounds.py",
    ),
    Mutant(
        "HLoRA as published forgets the client's scaling",
        "return TaskStart(grown, start.basis,",
        "return TaskStart(start.train, start.basis,",
        METHODS,
    ),
    Mutant(
        "raFLoRA does not divide by who holds a direction",
        "share = merge.step / torch.where(divisor > 0, divisor, 1.0)",
        "share = merge.step * torch.ones_like(divisor)",
        METHODS,
    ),
    Mutant(
        "what nobody holds is lost",
        "torch.where(divisor > 0, keep, 1.0)",
        "torch.full_like(divisor, 1.0 - merge.step)",
        METHODS,
    ),
    Mutant(
        "what a client started from is added",
        "yield -weight * share, update.task.start.train.factors[name]",
        "yield weight * share, update.task.start.train.factors[name]",
        METHODS,
    ),
    Mutant(
        "what rounding took of a start is taken for a change of its client",
        'state.arrived.append(update if self._frame(event) == "rotated" else self._lifted(update))',
        "state.arrived.append(update)",
        LIFTED,
    ),
    Mutant(
        "what rounding took is added to directions that an edge has turned",
        'state.arrived.append(update if self._frame(event) == "rotated" else self._lifted(update))',
        "state.arrived.append(self._lifted(update))",
        LIFTED,
    ),
    Mutant(
        "how far an answer moved depends on the order of its start in memory",
        "same_buffers(lay_flat(one, in_any_order=True) for one in (new, sent))",
        "same_buffers(lay_flat(one) for one in (new, sent))",
        "core/test_change_norms.py",
    ),
    Mutant(
        "where little is left to add, what clients could learn from is lost",
        "if directions < min(rank, *sides):",
        "if directions < 0:",
        "aggregate/test_merge_terms.py",
    ),
    Mutant(
        "a change in float16 is read as the values",
        "return base + numbers if self.is_change else numbers",
        "return numbers",
        "core/test_codec.py",
    ),
    Mutant(
        "FlexLoRA keeps one direction too few of the share of energy that was asked for",
        "count = min(factor.rank, 1 + int((reached < share * total).sum()))",
        "count = max(1, int((reached < share * total).sum()))",
        "aggregate/test_flexlora.py",
    ),
    Mutant(
        "what a method keeps in a fold is cut from the average",
        "room = max(rank, sum(factor.rank for _, factor in terms)) if folded else rank",
        "room = rank",
        "aggregate/test_averaged.py",
    ),
    Mutant(
        "a rank that was lowered keeps the learning rate of the higher one",
        "return 1.0 if self.rate is None else self.rate.multiple(self.rank)",
        "return 1.0 if self.rate is None else self.rate.multiple(self.rate.reference or 1)",
        "plan/test_budget.py",
    ),
    Mutant(
        "the head's learning rate follows the rank of the factors",
        """    if side == "dense":
        return 1.0
""",
        "",
        "train/test_rules.py",
    ),
    Mutant(
        "a server may give a task another learning rate than the terms say",
        "if budget.rate != terms.rates:",
        "if False:",
        "deploy/site/test_limits.py",
    ),
    Mutant(
        "dead directions are handed out",
        "revive(cut_factor(sorted_, budget.rank), budget.rank, derive(seed, name))",
        "cut_factor(sorted_, budget.rank)",
        METHODS,
    ),
    Mutant(
        "FedIT's directions die with a round of low ranks",
        "revive(factor, rank, derive(model.basis, name))",
        "factor",
        METHODS,
    ),
    Mutant(
        "what a client cannot train is not in its base",
        "for i in range(rank) if i not in without",
        "for i in range(rank) if i in without",
        METHODS,
    ),
    Mutant(
        "FedEx adds the mean of factors instead of taking it off",
        "[*changed, (-1.0, factor)]",
        "[*changed, (1.0, factor)]",
        METHODS,
    ),
    Mutant(
        "a merge forgets what was folded before",
        "before = [(1.0, model.fold.factors[name])] if model.fold and name in model.fold.factors else []",
        "before = []",
        METHODS,
    ),
    Mutant(
        "modules are averaged over everybody",
        'Q_j."""\n        return replace(model, adapter=move_factors(model.adapter, merge, holder_weights))',
        'Q_j."""\n        return replace(model, adapter=move_factors(model.adapter, merge, lambda *a: torch.ones(a[2])))',
        METHODS,
    ),
    Mutant(
        "adapters in one buffer are taken to have one form",
        "return plain and self.layout is other.layout and",
        "return plain and",
        "core/test_flat_buffer.py",
    ),
    Mutant(
        "numbers that are not finite pass where all lie in one buffer",
        "if math.isfinite(size) and size <= 0.5 * most:",
        "if not size > 0.5 * most:",
        "core/test_flat_buffer.py",
    ),
    Mutant(
        "a tensor is rounded by the largest of its neighbours in the buffer",
        "tensors.abs().amax(axes).tolist()]",
        "tensors.abs().amax().expand(len(tensors)).tolist()]",
        "core/test_codec.py",
    ),
    Mutant(
        "a frozen side may be changed",
        "if not sent.equal(back):",
        "if sent.shape != back.shape:",
        "core/test_validate_answer.py",
    ),
    Mutant(
        "an edge contributes layers that no member trained",
        "if name in state.trained_layers}",
        "}",
        "hierarchy/test_tree.py",
    ),
    Mutant(
        "what a region tells is learnt unseen",
        "if not self.trusted and (reason := why_invalid_statistics(task, statistics, self.shape)):",
        "if reason := None:",
        "hierarchy/test_root_server.py",
    ),
    Mutant(
        "a region is planned for whatever its members are",
        "        return str(error)",
        "        return None",
        "hierarchy/test_root_server.py",
    ),
    Mutant(
        "a region's report counts for layers that nobody trained",
        "        self.server.narrow_task(trained)\n",
        "",
        "hierarchy/test_root_server.py",
    ),
    Mutant(
        "what inner rounds wait is not learnt",
        "barrier=moving_average([max(barrier_seconds(one), slow_link_seconds(one, group)) for one in reports]),",
        "",
        "hierarchy/joint_plan/test_joint_plan.py",
    ),
    Mutant(
        "a pruned client is asked for its old rank",
        "budget = replace(budget, rank=min(budget.rank, state.pruned.get(client, budget.rank)))",
        "pass",
        "core/test_server.py",
    ),
    Mutant(
        "what did not change is paid for",
        "(before != after).any(along).tolist().count(True)",
        "after.shape[1 - along]",
        "core/test_message_size.py",
    ),
    Mutant(
        "the decomposition is not sorted",
        "return Factor(right, left * values), energy",
        "return Factor(right.flip(0), (left * values).flip(1)), energy",
        METHODS,
    ),
    Mutant(
        "NaN is a number",
        "if not math.isfinite(size):",
        "if size == math.inf:",
        "core/test_validate_answer.py",
    ),
    Mutant(
        "a client is drawn twice",
        "moved[place] = moved.get(k, k)",
        "pass",
        "schedule/test_client_draw.py",
    ),
    Mutant(
        "a dropped task is answered all the same",
        "self.dropped.update(order for _, order, _ in taken)",
        "self.dropped.update(())",
        "simulate/test_client_presence.py",
    ),
    Mutant(
        "a key that went and came back is sorted in twice",
        "self._changed.remove(key)",
        "return",
        "core/test_indexed_dict.py",
    ),
    Mutant(
        "whoever stood last is lost",
        "self._keys[position], self._values[position], self._positions[last] = last, moved, position",
        "self._keys[position], self._values[position] = last, moved",
        "core/test_indexed_dict.py",
    ),
    Mutant(
        "the anchor is added beside changes",
        "return replace(merge, as_delta=True, anchor=None)",
        "return replace(merge, as_delta=True)",
        WINDOWS,
    ),
    Mutant(
        "what the server has is in the window twice",
        "shares = [(-1.0, model), (1.0 - merge.step, merge.anchor or model)]",
        "shares = [(1.0 - merge.step, merge.anchor or model)]",
        WINDOWS,
    ),
    Mutant(
        "everybody started from the model of today",
        "(merge.step * weight, update.base or model)",
        "(merge.step * weight, model)",
        WINDOWS,
    ),
    Mutant(
        "folds are forgotten in a window",
        """        if one.fold and name in one.fold.factors:
            yield share, one.fold.factors[name]""",
        "",
        WINDOWS,
    ),
    Mutant(
        "LoRA-A2 adds a change once for every version that it is in",
        "adapter = add_offsets(move_factors(model.adapter, as_changes(merge), divide_by_one), base_offsets(model, merge))",
        "adapter = move_factors(model.adapter, as_changes(merge), divide_by_one)",
        WINDOWS,
    ),
    Mutant(
        "an average is in the sum of versions",
        "replace(update, base=update.base and last_version(update.base))",
        "update",
        WINDOWS,
    ),
    Mutant(
        "FedFa keeps one answer too many",
        "_latest(fleet, self.dedup)[-self.window :]",
        "_latest(fleet, self.dedup)[-self.window - 1 :]",
        "schedule/test_fedfa.py",
    ),
    Mutant(
        "FedFa begins with the model of today",
        "anchor=None if self.delta_rate or filled == 1.0 else fleet.first",
        "anchor=None",
        "schedule/test_fedfa.py",
    ),
    Mutant(
        "a version of nothing new",
        "len(fleet.arrived) > fleet.retained, len",
        "len(fleet.arrived) > 0, len",
        "schedule/test_fedfa.py::test_who_waits_for_a_full_window_waits_once",
    ),
    Mutant(
        "FedBuff's stale answers count less beside fresh ones alone",
        "step=self._rate(fleet) * counted",
        "step=self._rate(fleet)",
        "schedule/test_fedbuff.py",
    ),
    Mutant(
        "who waits for a version works on",
        "for client in drawn if client not in waiting]",
        "for client in drawn]",
        "schedule/test_fedbuff.py",
    ),
    Mutant(
        "FedAsync forgets the staleness",
        "step = self.mixing * self.discount(staleness(fleet, update))",
        "step = self.mixing",
        "schedule/test_fedasync.py",
    ),
    Mutant(
        "FedAsync throws away who came second",
        "step, retain=tuple(others), cancel",
        "step, cancel",
        "schedule/test_fedasync.py",
    ),
    Mutant(
        "whoever worked most goes on",
        "return sorted(drawn, key=seconds)",
        "return sorted(drawn, key=seconds, reverse=True)",
        "schedule/test_client_draw.py",
    ),
    Mutant(
        "the seconds of earlier tasks are forgotten",
        "self.state.work_seconds.get(task.client, 0.0) + self.state.now - task.sent",
        "self.state.now - task.sent",
        "core/test_server.py",
    ),
    Mutant(
        "work is aborted a version late",
        "fleet.version + 1 - item[1].version > limit",
        "fleet.version - item[1].version > limit",
        "schedule/test_staleness.py",
    ),
    Mutant(
        "an aborted place stays taken",
        "[self._cancel(number) for number in merge.cancel if number in state.busy]",
        "[Cancel(number, state.busy[number].client) for number in merge.cancel if number in state.busy]",
        SCHEDULES,
    ),
    Mutant(
        "seeds by hash()",
        'int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1',
        "hash(text) % 2**63",
        "core/test_seeds.py",
    ),
    Mutant(
        "names of a keyed seed run into each other",
        "spelt = json.dumps(names).encode()",
        'spelt = "/".join(map(str, names)).encode()',
        "core/test_seeds.py",
    ),
    Mutant("all are held out", "limit = min(share, max(sides))", "limit = share", "data/test_partition.py"),
    Mutant(
        "the row's place decides its side",
        'keyed_seed(secret, "held out", *map(without_surrogates, parts))',
        'keyed_seed(secret, "held out", index)',
        "data/test_partition.py",
    ),
    Mutant(
        "what a pass leaves over is a batch",
        "    full = len(order) - len(order) % size\n",
        "    full = len(order)\n",
        "train/test_batches.py",
    ),
    Mutant(
        "what a pass leaves over is never trained on",
        "            made, left = _pass_batches(",
        "            made, _ = _pass_batches(",
        "train/test_batches.py",
    ),
    Mutant(
        "all runs of a site draw alike",
        'keyed_seed(self.secret_of(task.client), "task", self.run, task.id, purpose)',
        'keyed_seed(self.secret_of(task.client), "task", task.id, purpose)',
        "train/test_trainer.py",
    ),
    Mutant(
        "a second request of a number has the draws of the first",
        "return self.counts.highest.get(run_hash) == (task, request)",
        "return True",
        "deploy/site/test_worker.py",
    ),
    Mutant(
        "a late message costs the state of the answer that was accepted last",
        "kept = {task, last_accepted, *newest, _named_by_newest(stored)}",
        "kept = {task, last_accepted, *newest}",
        "deploy/site/test_answer_journal.py",
    ),
    Mutant(
        "an exchanged secret is taken",
        "elif committed != self._digest(secret):",
        "elif False:",
        "deploy/site/test_site_secret.py",
    ),
    Mutant(
        "a layer is divided by everybody",
        "updates = tuple((w / total if total > 0 else 1 / len(chosen), self.update(update)) for w, update in chosen)",
        "updates = tuple((w, self.update(update)) for w, update in chosen)",
        DEPTHS,
    ),
    Mutant(
        "a layer that nobody trained is averaged with nothing",
        "if held else replace(piece, discarded=0.0)",
        "if held else replace(piece, adapter=_without(piece.adapter, ()), memory={})",
        DEPTHS,
    ),
    Mutant(
        "a version cut twice is two versions",
        "        if whole not in self.adapters:\n",
        "        if True:\n",
        DEPTHS,
    ),
    Mutant(
        "layers of different memories are one",
        "groups.setdefault((held, remembered), (held, []))",
        "groups.setdefault(held, (held, []))",
        DEPTHS,
    ),
    Mutant(
        "the head goes with the lowest layers",
        "dense=order[-1] in names)",
        "dense=order[0] in names)",
        DEPTHS,
    ),
    Mutant(
        "what is not trained does not run",
        "fold=Adapter(fold) if any(factor.rank for factor in below.values()) else start.fold,",
        "fold=start.fold,",
        DEPTHS,
    ),
    Mutant(
        "the fold of a layer is forgotten below",
        "fold[name] = stack([(1.0, fold[name]), (1.0, factor)]) if name in fold else factor",
        "fold[name] = factor",
        DEPTHS,
    ),
    Mutant(
        "a step without learnt slope",
        "covariance=(1 - gain) * (self.covariance + gain * deeper * longer),",
        "covariance=self.covariance,",
        "plan/test_client_cost.py",
    ),
    Mutant(
        "depth is counted from the input",
        "for name in names if self.depths[name] > depth)",
        "for name in names if self.layers + 1 - self.depths[name] > depth)",
        "core/test_model_shape.py",
    ),
    Mutant(
        "what is not sent back is paid for",
        "        return 4 * (self.adapter_parameters(rank, depth) + self.dense)",
        "        return 4 * (self.adapter_parameters(rank) + self.dense)",
        "core/test_model_shape.py",
    ),
    Mutant(
        "a client moves while its edge is at work",
        "if below.edges[below.edge_of[client]].server.outer is None",
        "if True",
        REGROUPED,
    ),
    Mutant(
        "an edge loses its last member",
        "for move in going if not after[move.edge]",
        "for move in going if False",
        REGROUPED,
    ),
    Mutant(
        "a client that moved is still counted on where it was",
        "self._edge(move.edge).handle(now, ClientLost(move.client))",
        "pass",
        REGROUPED,
    ),
    Mutant(
        "a client that moved is not taken in",
        "self._edge(move.to).handle(now, ClientJoined(reachable))",
        "pass",
        REGROUPED,
    ),
    Mutant(
        "the root knows an edge by the members that it had",
        "if before != group.edge and",
        "if before is None and",
        REGROUPED,
    ),
    Mutant(
        "the tasks of a client that moved begin anew",
        "record = below.edges[move.edge].server.take_record(move.client)",
        'record = below.edges[move.edge].server.take_record(move.client) | {"dispatched": 0}',
        "hierarchy/test_regrouping.py::test_what_is_known_of_a_client_moves_along",
    ),
    Mutant(
        "what a member did is forgotten when it moves",
        "_with_past(after, move.client, member_history(before, move.client))",
        "after",
        "hierarchy/test_regrouping.py::test_what_is_known_of_a_client_moves_along",
    ),
    Mutant(
        "whoever leaves a group in a swap is still waited for",
        "torch.where(offered == 0, second[:, None], slowest[:, None])[pairs]",
        "slowest[:, None].expand_as(offered)[pairs]",
        "hierarchy/test_near_iid.py::test_an_exchange_is_the_best_of_the_pair_by_the_definition_of_the_utility",
    ),
    Mutant(
        "examples that tie do not count in the AUC",
        "below, not_above = (torch.searchsorted(others, ours, right=right) for right in (False, True))",
        "below, not_above = (torch.searchsorted(others, ours, right=right) for right in (False, False))",
        "train/test_evaluate.py::test_the_area_is_the_probability_of_concordance",
    ),
    Mutant(
        "a label that nobody has counts in the macro F1",
        "2 * hits / (true + given) if true + given else None for hits",
        "2 * hits / (true + given) if true + given else 0.0 for hits",
        "train/test_confusion.py",
    ),
    Mutant(
        "the majority is looked up in the test examples",
        "commonest_label(self.split.train.labels or self._tested_labels())",
        "commonest_label(self._tested_labels())",
        "runs/test_job.py::test_the_baseline_is_the_commonest_training_label_on_the_examples_that_are_scored",
    ),
    Mutant(
        "an audit sounds its alarm at every other sound run",
        "surely=epsilon(mu - ALARM * error),",
        "surely=epsilon(mu),",
        "audit/test_epsilon_estimate.py",
    ),
    Mutant(
        "a certified bound is the best of many cuts, and not corrected for their number",
        "confidence = 1 - (1 - CONFIDENCE) / (2 * len(cuts))",
        "confidence = CONFIDENCE",
        "audit/test_epsilon_estimate.py",
    ),
    Mutant(
        "an audit takes what a release says that it spent for what it was promised, however often a client was merged",
        "mu = min(math.sqrt(max(squares.values())), client_event(toy, len(releases)).mu)",
        "mu = math.sqrt(max(squares.values()))",
        "audit/test_noise_check.py::test_a_client_that_is_merged_more_often_than_it_was_promised_is_noticed",
    ),
    Mutant(
        "what all clients have in common counts as told of one of them",
        "found[at == start] -= found[at == start].mean(0)",
        "found[at == start] -= 0.0",
        "audit/test_labels.py",
    ),
    Mutant(
        "a version tells nothing of clients that were merged before it",
        "if 0 <= version - at < band)",
        "if version == at)",
        "privacy/test_banded_merge.py",
    ),
    Mutant(
        "correlated noise is drawn without regard to the past",
        'earlier = state.releases[-1].value if state.releases else ""',
        'earlier = ""',
        "privacy/test_banded_merge.py::test_an_equal_sum_after_another_past_has_draws_of_its_own",
    ),
    Mutant(
        "noise of earlier versions is not taken back",
        "if weight := weights[version - at]:",
        "if False and (weight := weights[version - at]):",
        "privacy/test_banded_merge.py",
    ),
    Mutant(
        "the worst pattern is a client's last versions",
        "earliest = range(0, versions, apart)[:answers]",
        "earliest = range(0, versions, apart)[-answers:]",
        "privacy/test_correlated_noise.py::test_the_largest_sensitivity_is_that_of_the_worst_pattern",
    ),
    Mutant(
        "a site that answers often has as many votes",
        "limited = torch.minimum(shares, 2.0 * shares.quantile(0.5))",
        "limited = shares",
        "aggregate/test_robust.py::test_answers_of_one_client_are_one_change_and_one_voice",
    ),
    Mutant(
        "a liar is judged by one merge alone",
        "sums = self.memory * sums + torch.stack",
        "sums = 0.0 * sums + torch.stack",
        "aggregate/test_robust.py::test_a_liar_that_one_merge_does_not_show_is_found_in_several",
    ),
    Mutant(
        "liars are looked for layer by layer, among the few who trained one",
        'if getattr(aggregator, "merges_all_depths", False):',
        "if False:",
        "aggregate/test_robust.py::test_mixed_depth_is_judged_over_all_layers_at_once",
    ),
    Mutant(
        "moments are dropped that their client would have used once more",
        "place[1] < self.newest.get(place[0], 0)",
        "place[1] <= self.newest.get(place[0], 0)",
        STATES,
    ),
    Mutant(
        "a file goes that the last checkpoint names",
        "self._remove_all_but(self.checkpointed)",
        "self._remove_all_but(self.needed())",
        "runs/test_state_files.py",
    ),
    Mutant(
        "what was given up before makes nobody wait longer",
        "after * 2 ** given_up[sent.node]",
        "after",
        "deploy/server/test_nodes.py",
    ),
    Mutant(
        "the slope of a fused layer's input forgets the adapter",
        "            whole.addmm_(thin, down)",
        "            pass",
        "train/engine/test_linear_kernel.py",
    ),
    Mutant(
        "a small fold is added to weights in half precision, which round it away",
        "if weight.dtype not in (torch.float32, torch.float64):",
        "if weight is None:",
        "train/test_peft_weights.py",
    ),
    Mutant(
        "a checkpoint names a length inside what is compressed together",
        "        packed.end_member()",
        "        pass",
        "core/test_packed_log.py",
    ),
    Mutant(
        "a part of a table's part is one of all lines",
        "return replace(self, rows=self.rows[chosen])",
        "return replace(self, rows=np.arange(len(self.rows))[chosen])",
        "report/test_line_table.py",
    ),
]
