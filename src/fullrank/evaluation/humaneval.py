"""HumanEval (arXiv:2107.03374): programs that a model writes for 164 problems, run on the problems' own tests.

As in lm-evaluation-harness, whose model wrapper generates here: the prompt is the problem's own, a program ends at the
first of `STOP`, and prompt, completion and test make one source that must come to its end. pass@k is the paper's
unbiased estimate (its equation 1). The programs run in the sandbox of `sandbox.py`, for at most 3 seconds each as in
the authors' harness.

How the SIFT paper measured its HumanEval numbers is not in its repository, which has no code for it: number of samples,
temperature, nucleus, length and prompt are unknown, and a number of ours beside theirs may differ by that alone.

Samples are drawn in batches that do not depend on what is there already, each from a seed of its own. So an evaluation
that was stopped gives, continued, what it would have given. Another batch size gives other samples.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as progress

from fullrank.errors import ConfigError
from fullrank.evaluation.humaneval_problems import Problem, content, load_problems
from fullrank.evaluation.humaneval_records import Records, Sample
from fullrank.evaluation.model import content_hash
from fullrank.evaluation.sandbox import Outcome, run_program
from fullrank.train.data.sources import fingerprint
from fullrank.train.load import Loaded

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: lm-evaluation-harness's humaneval.yaml, which is the paper's list."""
PASS_AT = (1, 10)
PLACE = "{prompt}"
"""In a prompt template: where the problem's prompt goes."""

Item = tuple[Problem, int]
"""A problem, and the number of one of its samples."""


def evaluate_humaneval(
    lm: Any,
    *,
    data: str | None,
    num_samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    limit: int | None,
    seed: int,
    allow_code_execution: bool,
    records: Path | None = None,
    num_workers: int | None = None,
    prompt_template: str | None = None,
) -> dict[str, Any]:
    """Let a model write programs, run them, and estimate pass@1 and, of 10 samples or more, pass@10.

    Args:
        lm: lm-evaluation-harness's ``HFLM`` with a number as its batch size.
        data: HumanEval.jsonl, plain or compressed (.gz); None: the hub's dataset.
        num_samples: Programs for each problem.
        temperature: Of sampling; 0: the likeliest token each time, which makes one program.
        top_p: Probability mass that is sampled from; without effect at temperature 0.
        max_new_tokens: Longest completion.
        limit: Problems at most, the first ones.
        seed: Of the samples.
        allow_code_execution: Must be true: the programs are executed on this machine.
        records: File of the samples with their outcomes. It is written as they come; samples in it are not made again.
        num_workers: Programs that run at once; None: one for each CPU.
        prompt_template: Text around a problem's prompt, with ``{prompt}`` in its place; what the model writes is put
            behind the problem's prompt all the same. None: the prompt alone.

    Returns:
        ``pass@1`` and ``pass@10`` (shares), their standard errors over problems by the same names in ``stderr``,
        ``num_problems``, ``num_samples`` (of each problem), and the number of samples by ``reasons``.

    Raises:
        ConfigError: If a setting or the data is wrong, or ``records`` holds something else.
        UnsupportedError: If this machine cannot confine the programs.
    """
    check_settings(
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        allow_code_execution=allow_code_execution,
        num_workers=num_workers,
        prompt_template=prompt_template,
    )
    problems = load_problems(data, limit=limit)
    check_model(lm, problems, max_new_tokens=max_new_tokens, prompt_template=prompt_template)
    run_program("")  # a machine without a sandbox is found before anything is generated
    writing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "prompt_template": prompt_template}
    writing |= {"temperature": temperature, "top_p": top_p if temperature > 0 else None}
    settings = {"problems": content(problems), "limit": limit, "num_samples": num_samples, **writing}
    kept = Records(records, settings if records is None else {**settings, **_identity(lm)})
    items = [(problem, sample) for problem in problems for sample in range(num_samples)]
    missing = {_key(item) for item in items} - kept.samples.keys()
    completions = _completions(lm, items, missing, **writing)
    with progress.tqdm(total=len(items), initial=len(items) - len(missing), desc="humaneval", unit="program") as bar:
        for sample in _outcomes(completions, num_workers=num_workers or os.cpu_count() or 1):
            kept.add(sample)
            bar.update()
    return summarize([kept.samples[_key(item)] for item in items], num_samples=num_samples)


def _identity(lm: Any) -> dict[str, Any]:
    """What samples depend on beside the settings: the model's content, and how many are drawn at once."""
    return {"model": content_hash(Loaded(lm.model, lm.tokenizer, base="")), "batch_size": lm.batch_size}


def check_settings(
    *,
    num_samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    allow_code_execution: bool,
    num_workers: int | None = None,
    prompt_template: str | None = None,
) -> None:
    """Check what does not depend on a model.

    Raises:
        ConfigError: If a setting is out of bounds, or nobody allowed to execute what a model writes.
    """
    if not allow_code_execution:
        raise ConfigError(
            "allow_code_execution is false, and humaneval executes programs that a model wrote on this machine. They "
            "run in a sandbox, which is not a virtual machine; set allow_code_execution to true to allow it."
        )
    for name, count in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("num_workers", num_workers)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}. Raise it.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature must be a number of at least 0, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p}. 1 samples from all tokens.")
    if temperature == 0 and num_samples > 1:
        raise ConfigError(
            f"num_samples is {num_samples} at temperature 0, where all samples are the same. Set num_samples to 1, or "
            "temperature to a number above 0, such as 0.8."
        )
    if prompt_template is not None and PLACE not in prompt_template:
        raise ConfigError(f"prompt_template has no {PLACE}, got {prompt_template!r}. Put it where the prompt goes.")


def check_model(lm: Any, problems: Sequence[Problem], *, max_new_tokens: int, prompt_template: str | None) -> None:
    """Check that a model takes every prompt whole, and the longest completion behind it.

    Raises:
        ConfigError: If it does not, or its batch size is no number.
    """
    if not isinstance(lm.batch_size, int):
        raise ConfigError(
            f"batch_size must be a number for humaneval, got {lm.batch_size!r}: samples depend on what they are "
            "batched with. Set it to a number, such as 8."
        )
    longest = max(lm.tok_batch_encode([_prompt(problem, prompt_template)])[0].shape[1] for problem in problems)
    if longest + max_new_tokens > lm.max_length:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens} behind a prompt of up to {longest} tokens, and the model takes "
            f"{lm.max_length} in all. Set max_new_tokens to at most {lm.max_length - longest}."
        )


def _prompt(problem: Problem, template: str | None) -> str:
    return problem.prompt if template is None else template.replace(PLACE, problem.prompt)


def _key(item: Item) -> tuple[str, int]:
    return item[0].task_id, item[1]


def _completions(
    lm: Any,
    items: Sequence[Item],
    missing: set[tuple[str, int]],
    *,
    seed: int,
    max_new_tokens: int,
    prompt_template: str | None,
    temperature: float,
    top_p: float | None,
) -> Iterator[tuple[Item, str]]:
    """What the model writes for the missing items.

    A batch with a missing item is made as a whole: the other items take part in what is drawn.
    """
    from lm_eval.api.instance import Instance

    wanted: dict[str, Any] = {"until": list(STOP), "max_gen_toks": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        wanted |= {"temperature": temperature, "top_p": top_p, "top_k": 0}  # else transformers takes the best 50 alone
    for start in range(0, len(items), lm.batch_size):
        batch = items[start : start + lm.batch_size]
        if missing.isdisjoint(map(_key, batch)):
            continue
        requests = [
            Instance("generate_until", doc={}, arguments=(_prompt(problem, prompt_template), wanted), idx=number)
            for number, (problem, _) in enumerate(batch)
        ]
        with _seeded(lm, int(fingerprint(seed, *_key(batch[0])), 16) % 2**63), _exact_text(lm):
            texts = lm.generate_until(requests, disable_tqdm=True)
        for item, text in zip(batch, texts, strict=True):
            if _key(item) in missing:
                yield item, truncate(text)


@contextmanager
def _seeded(lm: Any, seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU and on the model's device, and leave their generators as they were."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _exact_text(lm: Any) -> Iterator[None]:
    """Have the wrapper decode what was written as it continues the prompt.

    It decodes the new tokens alone, as if they began a text. There LLaMA's tokenizer drops a space, and so a function's
    first line would lose a column of its indentation.
    """
    tokenizer = lm.tokenizer
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def decode(tokens: Any, skip_special_tokens: bool = True) -> str:
        def text(these: Any) -> str:
            decoded: str = tokenizer.decode(
                these, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return decoded

        return text([*anchor, *tokens])[len(text(anchor)) :] if isinstance(tokens, list) else text(tokens)

    lm.tok_decode = decode
    try:
        yield
    finally:
        del lm.tok_decode


def truncate(text: str) -> str:
    """A completion up to the first of the stop sequences."""
    return text[: min((at for stop in STOP if (at := text.find(stop)) >= 0), default=len(text))]


def _outcomes(completions: Iterator[tuple[Item, str]], *, num_workers: int) -> Iterator[Sample]:
    """Run the programs while further ones are written; their outcomes in the same order."""
    waiting: deque[tuple[Item, str, Future[Outcome]]] = deque()

    def first() -> Sample:
        (problem, sample), completion, future = waiting.popleft()
        outcome = future.result()
        return Sample(problem.task_id, sample, completion, outcome.passed, outcome.reason)

    # threads suffice: each waits for a process
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item, completion in completions:
            waiting.append((item, completion, pool.submit(run_program, item[0].program(completion))))
            while waiting and waiting[0][2].done():
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples passes: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ConfigError(f"k must be between 1 and the number of samples ({num_samples}), got {k}.")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def summarize(samples: Sequence[Sample], *, num_samples: int) -> dict[str, Any]:
    """Means over problems, of samples in the order of their problems."""
    passed = [
        sum(sample.passed for sample in samples[start : start + num_samples])
        for start in range(0, len(samples), num_samples)
    ]
    result: dict[str, Any] = {"stderr": {}}
    for k in PASS_AT:
        if k <= num_samples:
            values = [pass_at_k(num_samples, count, k) for count in passed]
            result[f"pass@{k}"] = statistics.fmean(values)
            if len(values) > 1:
                result["stderr"][f"pass@{k}"] = statistics.stdev(values) / math.sqrt(len(values))
    # "failed: NameError: name 'x' is not defined" is one of many with the same error
    reasons = Counter(": ".join(sample.reason.split(": ")[:2]) for sample in samples)
    return {**result, "num_problems": len(passed), "num_samples": num_samples, "reasons": dict(reasons.most_common())}
