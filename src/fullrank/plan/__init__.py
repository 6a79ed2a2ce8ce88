"""What a run will need: bytes of weights, gradients, optimizer states and activations, from a configuration alone.

    from fullrank.plan import PlanOptions, plan

    found = plan(PlanOptions(model="llama-7b", sequence_length=2048, gpu="24GB"))
    print(found)

The static parts follow from shapes. What a step allocates is found by making it: model, method and optimizer are the
real ones, their tensors have shapes and no content (``tracker``). Where all layers are alike, models of two and of
three of them are traced, and of one and of two sequences; every moment of the step is affine in both (``timeline``).
"""

from fullrank.plan.options import Budget, PlanOptions
from fullrank.plan.run import Plan, Row, plan
from fullrank.plan.usage import Planner, Setting, Usage

__all__ = ["Budget", "Plan", "PlanOptions", "Planner", "Row", "Setting", "Usage", "plan"]
