"""A step being planned: the message to the workers, and what the scheduler keeps of it until the result is there.

Decides nothing; knows nothing of budgets or of queues.
"""

from __future__ import annotations

from dataclasses import dataclass

from servd.cache.kv_cache_manager import Allocation
from servd.outputs import ScheduledRequests, SchedulerOutput
from servd.request import Request


@dataclass(slots=True)
class Share:
    """A request's part of a step in flight."""

    request: Request
    num_computed_before: int
    num_computed_after: int
    samples: bool
    num_drafts: int = 0  # that the worker may guess


class Plan:
    """A SchedulerOutput being put together."""

    def __init__(self, step_id: int, dropped: list[str]) -> None:
        scheduled = ScheduledRequests([], [], [], [], [])
        self.output = SchedulerOutput(step_id, [], scheduled, dropped, [], [])
        self.shares: list[Share] = []

    def add(self, request: Request, num_tokens: int, samples: bool, allocation: Allocation) -> None:
        """The next tokens of a request, whose first is `num_computed_tokens`."""
        output, scheduled = self.output, self.output.scheduled
        scheduled.request_ids.append(request.request_id)
        scheduled.num_computed_tokens.append(request.num_computed_tokens)
        scheduled.num_scheduled_tokens.append(num_tokens)
        scheduled.samples.append(samples)
        scheduled.new_block_ids.append(allocation.new_block_ids)
        output.block_copies.extend(allocation.copies)
        output.replaced_blocks.extend((request.request_id, i, block) for i, block in allocation.replaced)
        first = request.num_computed_tokens
        self.shares.append(Share(request, first, first + num_tokens, samples))
