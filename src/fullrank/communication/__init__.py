"""What a process sends in an optimizer step, and what state it keeps: by method, strategy and number of processes.

Formulas, so that a run on many GPUs can be judged before it is started; the tests count what is really sent against
them. Three numbers are told apart for every collective over P processes:

    payload   the numbers of the tensor that it is about: what goes into an all-reduce or a reduce-scatter, what comes
              out of an all-gather or a broadcast. This is what a count of the calls finds.
    sent      what one process puts on its link. Ring collectives send 2 x (P - 1) / P of an all-reduce of x,
              x (P - 1) / P of a reduce-scatter or an all-gather, and pass on x of a broadcast
              (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "bus bandwidth").
    calls     collectives: requests of one kind wait for each other and share buffers of ``sharding.BUCKET`` numbers.
              Of a step that also refreshes bases they are about the sum of both.

An m x n matrix below is oriented: n is its projected side (``proj_type`` std: the short one), r the rank. FSDP2 cuts a
weight along its rows. Of a weight with at least as many rows as columns that is along m ("tall"): R = G Q stays where
its rows are, and the basis Q (n x r, kept in parts) is joined for a step. Of a wider one it is along n ("wide"): R is a
sum over the processes, and Q stays where its columns are. Parts are those of ``torch.chunk``, padded to equal length
where they are sent.
"""

from fullrank.communication.layout import Collective, Layout, Matrix, padded, payload, sent_bytes
from fullrank.communication.projected import refresh_traffic, step_traffic
from fullrank.communication.state import state_numbers
from fullrank.communication.strategy import gradient_traffic, partition_traffic, restart_traffic, sift_traffic

__all__ = [
    "Collective",
    "Layout",
    "Matrix",
    "gradient_traffic",
    "padded",
    "partition_traffic",
    "payload",
    "refresh_traffic",
    "restart_traffic",
    "sent_bytes",
    "sift_traffic",
    "state_numbers",
    "step_traffic",
]
