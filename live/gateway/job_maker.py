"""From the body of a request to jobs of the service."""

from collections.abc import Mapping
from typing import Any

from live.config import LiveConfig
from live.gateway.bodies import ChatBody, CompletionBody, is_pinned, max_tokens_of, prompts_of
from live.gateway.errors import ApiError
from live.gateway.prompts import PromptCounter
from live.gateway.slo import Slo
from live.jobs import Job
from qlm_sim.core.types import Request

MOST_PROMPTS = 2048
"""Of one body: each is a request of its own. More belong in a batch."""


class JobMaker:
    """From a client's body to jobs: one for each prompt. Batch lines take the same way."""

    def __init__(self, config: LiveConfig, model_lengths: Mapping[str, int]) -> None:
        """``model_lengths``: longest context of each served model, in tokens."""
        self.counters = {model.name: PromptCounter(model) for model in config.model}
        self._lengths = dict(model_lengths)

    def check_model(self, model: str) -> None:
        if model not in self._lengths:
            raise ApiError(
                404,
                f"The model {model!r} does not exist.",
                code="model_not_found",
                param="model",
            )

    def jobs(
        self,
        body: dict[str, Any],
        fields: CompletionBody | ChatBody,
        endpoint: str,
        answer_id: str,
        *,
        slo: Slo,
        tenant: str,
        arrived_at: float,
    ) -> list[Job]:
        """The jobs of one body. Raises ApiError 400 where a prompt is too long."""
        counter = self.counters[fields.model]
        pinned = is_pinned(body, fields)
        if isinstance(fields, ChatBody):
            prompts: list[Any] = [None]
        else:
            prompts = prompts_of(fields)
        if len(prompts) > MOST_PROMPTS:
            raise ApiError(
                400, f"prompt: found {len(prompts)} prompts, expected at most {MOST_PROMPTS}.", param="prompt"
            )
        jobs = []
        for number, prompt in enumerate(prompts):
            tokens = counter.of_chat(fields) if isinstance(fields, ChatBody) else counter.of_text(prompt)
            most = self._most_tokens(fields, prompt, tokens, counter)
            jobs.append(
                Job(
                    request=Request(
                        id=answer_id if len(prompts) == 1 else f"{answer_id}-{number}",
                        model=fields.model,
                        slo_class=slo.name,
                        slo_s=slo.ttft_s,
                        arrived_at=arrived_at,
                        prompt_tokens=tokens,
                        max_tokens=most,
                    ),
                    endpoint=endpoint,
                    body=body if len(prompts) == 1 and prompt is body.get("prompt") else _with(body, prompt),
                    tenant=tenant,
                    pinned=pinned,
                )
            )
        return jobs

    def _most_tokens(
        self, fields: CompletionBody | ChatBody, prompt: object, tokens: int, counter: PromptCounter
    ) -> int:
        """What may be generated: what the client says, within the context that the prompt leaves.

        For a chat without a limit only an estimate, for the scheduler: its engine knows what is left.
        """
        length = self._lengths[fields.model]
        asked = max_tokens_of(fields)
        exact = isinstance(prompt, list) or (counter.exact and not isinstance(fields, ChatBody))
        if exact and tokens + (asked or 1) > length:
            raise ApiError(
                400,
                f"This model's maximum context length is {length} tokens. However, you requested "
                f"{tokens + (asked or 1)} tokens ({tokens} in the prompt, {asked or 1} in the completion).",
                code="context_length_exceeded",
                param="messages" if isinstance(fields, ChatBody) else "prompt",
            )
        return asked if asked is not None else max(1, length - tokens)


def _with(body: dict[str, Any], prompt: object) -> dict[str, Any]:
    return body if prompt is None else {**body, "prompt": prompt}
