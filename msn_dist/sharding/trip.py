"""A differentiable message in two halves, so that other work can run while it travels.

`depart` encodes and sends, `arrive` receives and decodes.  In the backward the node of `arrive` sends the gradient
home and the node of `depart` receives it: what the autograd engine runs between the two is hidden work as well.

Shape suffixes: X rows sent, Y rows received, D width.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from msn_dist.sharding.exchange import Exchange, Flight
from msn_dist.sharding.wire import Wire


class Trip:
    """One all-to-all of floating rows, and of their gradients the other way."""

    def __init__(
        self,
        exchange: Exchange,
        name: str,
        send_splits: list[int],
        receive_splits: list[int],
        there: Wire,
        back: Wire,
    ) -> None:
        self.exchange, self.name = exchange, name
        self.send_splits, self.receive_splits = send_splits, receive_splits
        self.there, self.back = there, back
        self._flight: Flight | None = None
        self._ticket: Tensor | None = None

    def depart(self, rows_X: Tensor) -> Trip:
        """Send `rows_X` [X, ...], send_splits[w] rows to rank w."""
        self._ticket = _Depart.apply(rows_X, self)
        return self

    def arrive(self) -> Tensor:
        """rows_Y, receive_splits[w] rows from rank w, float32."""
        ticket, self._ticket = self._ticket, None  # or its node, which holds this trip, would be held by it
        return _Arrive.apply(ticket, self)

    def _send(self, direction: str, name: str, message: Tensor, send_splits: list[int], receive_splits: list[int]):
        self._flight = self.exchange.start(direction, name, message, send_splits, receive_splits)

    def _receive(self) -> Tensor:
        flight, self._flight = self._flight, None
        return flight.wait()


class _Depart(Function):
    @staticmethod
    def forward(ctx, rows_X, trip):
        ctx.trip = trip
        trip._send("forward", trip.name, trip.there.encode(rows_X), trip.send_splits, trip.receive_splits)
        return rows_X.new_empty(0)  # ties the two nodes together

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.trip.back.decode(ctx.trip._receive()), None


class _Arrive(Function):
    @staticmethod
    def forward(ctx, ticket, trip):
        ctx.trip = trip
        return trip.there.decode(trip._receive())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_Y):
        trip = ctx.trip
        message = trip.back.encode(gradient_Y)
        trip._send("backward", f"{trip.name}_gradient", message, trip.receive_splits, trip.send_splits)
        return gradient_Y.new_empty(0), None
