"""Ways to write capacity routing with flat tables: tokens are written to seat numbers, and read back from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import E, H, K, Listed, Routed, Spelling, batches, tokens


class SpareRow(Routed):
    """Each choice is a vector of its own; the dropped are written to a row behind all seats and read back as zeros."""

    def seats(self, chosen, count):
        """Per choice: its seats, and which tokens are kept."""
        capacity = K * ((count + E - 1) // E) if self.factor >= 1 else math.ceil(count * self.factor / E)
        masks = [F.one_hot(ids, E) for ids in chosen]
        before, found = None, []
        for ids, mask in zip(chosen, masks, strict=True):
            place = torch.cumsum(mask, 0) - 1
            place = place if before is None else place + before
            before = mask.sum(0, keepdim=True)
            place = (place * mask).sum(1)
            found.append((ids, place, place < capacity))
        return capacity, found

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, found = self.seats([ids.view(-1) for ids in chosen.chunk(K, dim=1)], x.size(0))
        buffer, places = x.new_zeros(E * capacity + 1, H), []
        for ids, place, kept in found:
            seat = torch.where(kept, ids * capacity + place, torch.full_like(ids, E * capacity))
            buffer = buffer.index_add(0, seat, x * kept.unsqueeze(1).to(x.dtype))
            places.append(seat)
        y = self.experts(buffer[:-1].view(E, capacity, H))
        y = torch.cat([y.reshape(E * capacity, H), y.new_zeros(1, H)])
        out = 0
        for slot, seat in enumerate(places):
            out = out + y[seat] * w[:, slot].unsqueeze(1)
        return out


class MaskedBack(SpareRow):
    """The dropped are written as zeros to a seat of another; their weights are zero when rows are read back."""

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, found = self.seats([ids.view(-1) for ids in chosen.chunk(K, dim=1)], x.size(0))
        buffer, kept_seats = torch.zeros(E * capacity, H), []
        for ids, place, kept in found:
            seat = (ids * capacity + place) * kept
            buffer.index_add_(0, seat, x * kept[:, None])
            kept_seats.append((seat, kept))
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        weighted = [y[seat] * (w[:, i] * kept).unsqueeze(-1) for i, (seat, kept) in enumerate(kept_seats)]
        return weighted[0] + weighted[1]


class AllAtOnce(Routed):
    """All choices in one queue; tokens repeated for them, written by a wide index; a sum over choices behind."""

    experts_of = Listed

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        w, chosen = self.choose(x)
        capacity = max(2, int(self.factor * x.shape[0] * K / E))
        flat = chosen.view(-1)
        mask = F.one_hot(flat, E)
        place = (torch.cumsum(mask, dim=0) - 1).gather(1, flat.unsqueeze(1)).squeeze(1)
        seat = (flat * capacity + place).masked_fill(place >= capacity, E * capacity)
        rows = x.repeat_interleave(K, dim=0)
        buffer = torch.zeros(E * capacity + 1, H).scatter(0, seat[:, None].expand(-1, H), rows)
        y = self.experts(buffer[: E * capacity].view(E, capacity, H)).reshape(-1, H)
        y = torch.cat((y, torch.zeros(1, H)), dim=0)
        back = y[seat].view(-1, K, H)
        return (back * w.unsqueeze(-1)).sum(dim=1).view(shape)


class OneChoice(Routed):
    """One expert a token, the dropped read back zeros."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        capacity = max(1, math.ceil(self.factor * x.shape[0] / E))
        mask = F.one_hot(chosen, E)
        place = ((torch.cumsum(mask, 0) - 1) * mask).sum(-1)
        kept = ~(place >= capacity)
        seat = torch.where(kept, chosen * capacity + place, E * capacity)
        buffer = torch.zeros(E * capacity + 1, H)
        buffer[seat] = x
        y = self.experts(buffer[:-1].view(E, capacity, H))
        y = torch.cat([y.view(-1, H), torch.zeros(1, H)])
        return y[seat] * gate.unsqueeze(1)


class Einsummed(AllAtOnce):
    """Enough seats for all: no drops at all; einsum over the choices."""

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        w, chosen = self.choose(x)
        capacity = x.shape[0]
        flat = chosen.reshape(-1)
        mask = F.one_hot(flat, E)
        place = ((mask.cumsum(0) - 1) * mask).sum(-1)
        seat = flat * capacity + place
        buffer = x.new_zeros(E * capacity, H)
        buffer[seat] = x[:, None].expand(-1, K, -1).reshape(-1, H)
        y = self.experts(buffer.view(E, capacity, H)).reshape(E * capacity, H)
        return torch.einsum("tkh,tk->th", y[seat].view(-1, K, H), w).view(shape)


class ClampedPlaces(Routed):
    """Places beyond the last seat are clamped to it: there the dropped add zeros, and weigh nothing when read."""

    def places(self, chosen, count):
        """Of all choices, flat: experts, places below the capacity, and which are kept."""
        capacity = max(1, math.ceil(0.6 * K * count / E))
        flat = chosen.reshape(-1)
        place = (torch.cumsum(F.one_hot(flat, E), 0) - 1).gather(1, flat[:, None]).squeeze(1)
        return capacity, flat, place.clamp(max=capacity - 1), place < capacity

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, ids, place, kept = self.places(chosen, x.shape[0])
        seat = (ids * capacity + place)[:, None].expand(-1, H)
        buffer = torch.zeros(E * capacity, H).scatter_add(0, seat, self.sent(x, kept))
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        return (y.gather(0, seat) * self.weighed(w, kept)).view(-1, K, H).sum(1)

    def sent(self, x, kept):
        return x.repeat_interleave(K, 0) * kept[:, None]

    def weighed(self, w, kept):
        return (w.reshape(-1) * kept)[:, None]


class ClampedByPlace(ClampedPlaces):
    """The same with a table of an axis of experts."""

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, ids, place, kept = self.places(chosen, x.shape[0])
        buffer = torch.zeros(E, capacity, H)
        buffer.index_put_((ids, place), self.sent(x, kept), accumulate=True)
        return (self.experts(buffer)[ids, place] * self.weighed(w, kept)).view(-1, K, H).sum(1)


class CountedFromZeros(Routed):
    """How many sit already is counted on from zeros, one choice after the other."""

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, before, found = max(1, math.ceil(0.6 * K * x.shape[0] / E)), torch.zeros(1, E, dtype=torch.long), []
        for slot in range(K):
            mask = F.one_hot(chosen[:, slot], E)
            place = ((mask.cumsum(0) - 1 + before) * mask).sum(1)
            before = before + mask.sum(0, keepdim=True)
            found.append((chosen[:, slot] * capacity + place.clamp(max=capacity - 1), place < capacity))
        buffer = torch.zeros(E * capacity, H)
        for seat, kept in found:
            buffer = buffer.index_add(0, seat, x * kept[:, None])
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        out = 0
        for slot, (seat, kept) in enumerate(found):
            out = out + y[seat] * (w[:, slot] * kept)[:, None]
        return out


SPELLINGS = (
    Spelling("SpareRow", "P8", SpareRow, tokens),
    Spelling("SpareRowDrops", "P8", lambda: SpareRow(0.75), tokens),
    Spelling("MaskedBack", "P8", lambda: MaskedBack(0.9), tokens),
    Spelling("AllAtOnce", "P8", lambda: AllAtOnce(0.75), batches),
    Spelling("OneChoice", "P8", lambda: OneChoice(0.75), tokens),
    Spelling("Einsummed", "P8", Einsummed, batches),
    *(Spelling(kind.__name__, "P8", kind, tokens) for kind in (ClampedPlaces, ClampedByPlace, CountedFromZeros)),
)


class OthersSeat(MaskedBack):
    """Near miss: the dropped read the row of another, with their weights."""

    def forward(self, x):
        w, chosen = self.choose(x)
        capacity, found = self.seats([ids.view(-1) for ids in chosen.chunk(K, dim=1)], x.size(0))
        buffer, seats = torch.zeros(E * capacity, H), []
        for ids, place, kept in found:
            seat = (ids * capacity + place) * kept
            buffer.index_add_(0, seat, x * kept[:, None])
            seats.append(seat)
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        return y[seats[0]] * w[:, :1] + y[seats[1]] * w[:, 1:]


class ClampedAndSent(ClampedPlaces):
    """Near miss: the dropped are added to the last seat."""

    def sent(self, x, kept):
        return x.repeat_interleave(K, 0)


class ClampedAndRead(ClampedPlaces):
    """Near miss: the dropped read the last seat's row."""

    def weighed(self, w, kept):
        return w.reshape(-1)[:, None]


class ClampedBelow(ClampedPlaces):
    """Near miss: places are clamped one seat too early, where two tokens meet."""

    def places(self, chosen, count):
        capacity, ids, place, kept = super().places(chosen, count)
        return capacity, ids, place.clamp(max=capacity - 2), kept


class OwnQueues(SpareRow):
    """Near miss: both choices count from 0, and two tokens share a seat."""

    def seats(self, chosen, count):
        masks = [F.one_hot(ids, E) for ids in chosen]
        places = [((torch.cumsum(mask, 0) - 1) * mask).sum(1) for mask in masks]
        return count, [(ids, place, place < count) for ids, place in zip(chosen, places, strict=True)]


class WrongStride(OneChoice):
    """Near miss: seats of neighbouring experts overlap."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        capacity = x.shape[0]
        mask = F.one_hot(chosen, E)
        place = ((torch.cumsum(mask, 0) - 1) * mask).sum(-1)
        seat = chosen * (capacity - 1) + place
        buffer = torch.zeros(E * capacity, H).index_add(0, seat, x)
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        return y[seat] * gate.unsqueeze(1)


class SpareRead(OneChoice):
    """Near miss: the row that the dropped read back is of ones."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        capacity = max(1, math.ceil(0.5 * x.shape[0] / E))
        mask = F.one_hot(chosen, E)
        place = ((torch.cumsum(mask, 0) - 1) * mask).sum(-1)
        seat = torch.where(place < capacity, chosen * capacity + place, E * capacity)
        buffer = torch.zeros(E * capacity + 1, H)
        buffer[seat] = x
        y = self.experts(buffer[:-1].view(E, capacity, H))
        y = torch.cat([y.view(-1, H), torch.ones(1, H)])
        return y[seat] * gate.unsqueeze(1)


NEAR = (OthersSeat, OwnQueues, WrongStride, SpareRead, ClampedAndSent, ClampedAndRead, ClampedBelow)
