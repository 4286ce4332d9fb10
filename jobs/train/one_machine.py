"""Ray Train on an embedded Ray, which is one run's own: without the actors that only a cluster has use for.

Enters: what a TorchTrainer takes. Leaves: the same training, with three processes fewer beside it. One would
hold Ray Data's datasets, of which we have none; one frees the workers' place when their driver has died, but
an embedded Ray dies with it; one asks an autoscaler for machines, and there is none. Each has nothing to do
and wakes 150 times a second all the same (docs/decisions, 0013).
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

_FOR_CLUSTERS = (DatasetsCallback, PlacementGroupCleanerCallback)


class OneMachineTrainer(TorchTrainer):
    """A TorchTrainer for an embedded Ray, a number of workers that stays, and no datasets of Ray Data."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [made for made in super()._create_default_callbacks() if not isinstance(made, _FOR_CLUSTERS)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = _NoAutoscaler(arguments["scaling_policy"].scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class _NoAutoscaler(FixedScalingPolicy):
    def _send_resource_request(self) -> None:
        """Nobody could fulfil it."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody could fulfil it."""

    def _cancel_resource_request(self) -> None:
        """There is none."""
