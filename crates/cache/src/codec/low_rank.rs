//! HOT PATH (decode). Rows projected on some axes of theirs, all KV heads of a layer together.
//!
//! `z = Uᵀ · x` is what is stored, in a codec of its own, and `U · z` is what is read, `U` being the first axes of a
//! [`LowRankTable`](crate::offline::LowRankTable). Keys are turned back to where they were before RoPE first (a block's rows are turned by their
//! row in it), and turned again when they are read.

use std::cell::RefCell;

use half::f16;
use kvasir_kernels::{
    BackMatrix, FromLatents, RowElement, StoredRows, f16_to_f32, f32_to_f16, gemm_nn_acc,
    rows_from_latents,
};

use super::{Codec, CodecKind, GearCodec, Part};
use crate::offline::Axes;

/// The latents' codec.
#[derive(Debug)]
enum Latents {
    Stateless(&'static dyn Codec),
    Gear(GearCodec),
}

/// What turns keys: cosines and sines of the rows of a block.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    pub(crate) cos: Vec<f32>, // [block_size, head_dim / 2]
    pub(crate) sin: Vec<f32>, // the same
}

/// The latents that one head is read from.
#[derive(Debug, Clone, Default)]
struct Head {
    /// The first of them.
    first: usize,
    /// From latents to channels.
    back: BackMatrix,
}

/// Keys or values of a layer. See the module's documentation.
#[derive(Debug)]
pub struct LowRankCodec {
    heads: Vec<Head>,
    head_dim: usize,
    rank: usize,
    /// From channels to latents: `[heads · head_dim, rank]`.
    forth: Vec<f32>,
    /// Of keys.
    turns: Option<Turns>,
    latents: Latents,
    /// Share of the energy that the axes leave out.
    lost: f32,
}

#[derive(Debug, Default)]
struct Scratch {
    halves: Vec<f16>,
    latents: Vec<f32>, // [tokens, rank]
    rows: Vec<f32>,    // [tokens, width]
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl LowRankCodec {
    /// Keeps as many axes of every group as `ranks` says; latents are stored as `kind` stores rows of a head.
    pub(crate) fn new(
        axes: &Axes,
        ranks: &[usize],
        head_dim: usize,
        turns: Option<Turns>,
        (kind, part): (CodecKind, Part),
    ) -> Self {
        let num_heads: usize = axes.groups.iter().map(|g| g.heads.len()).sum();
        let rank: usize = ranks.iter().sum();
        let mut forth = vec![0.0; num_heads * head_dim * rank];
        let mut heads = vec![Head::default(); num_heads];
        let (mut first, mut kept, mut all) = (0, 0.0, 0.0);
        for (group, own) in axes.groups.iter().zip(ranks) {
            let width = group.energies.len();
            kept += group.energies[..*own].iter().sum::<f32>();
            all += group.energies.iter().sum::<f32>();
            for (at, head) in group.heads.iter().enumerate() {
                let channels = at * head_dim..(at + 1) * head_dim;
                let axes = group.axes.chunks_exact(width).take(*own);
                let back: Vec<f32> =
                    axes.flat_map(|a| a[channels.clone()].iter().copied()).collect();
                for (axis, row) in back.chunks_exact(head_dim).enumerate() {
                    for (c, x) in row.iter().enumerate() {
                        forth[(head * head_dim + c) * rank + first + axis] = *x;
                    }
                }
                heads[*head] = Head { first, back: BackMatrix::new(&back, head_dim) };
            }
            first += own;
        }
        let latents = match kind {
            CodecKind::Gear(gear) => Latents::Gear(GearCodec::new(gear, part)),
            other => Latents::Stateless(other.stateless(part)),
        };
        let lost = if all > 0.0 { (1.0 - kept / all).max(0.0) } else { 0.0 };
        Self { heads, head_dim, rank, forth, turns, latents, lost }
    }

    /// Latents of a row.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Whether latents are in f32, and so rows should be.
    pub(crate) fn is_f32(&self) -> bool {
        matches!(self.latents, Latents::Stateless(codec) if codec.name() == "f32")
    }

    /// Bytes of its matrices.
    pub(crate) fn num_bytes(&self) -> usize {
        let turns = self.turns.as_ref().map_or(0, |t| t.cos.len() + t.sin.len());
        4 * (2 * self.forth.len() + turns)
    }

    fn inner(&self) -> &dyn Codec {
        match &self.latents {
            Latents::Stateless(codec) => *codec,
            Latents::Gear(codec) => codec,
        }
    }

    /// The first `n` rows of latents.
    fn latents(&self, slot: &[u8], tokens: usize, n: usize, scratch: &mut Scratch) {
        let Scratch { halves, latents, .. } = scratch;
        latents.resize(n * self.rank, 0.0);
        halves.resize(n * self.rank, f16::ZERO);
        match self.inner().decode_halves(slot, tokens, self.rank, halves) {
            true => f16_to_f32(halves, latents),
            false => self.inner().decode(slot, tokens, self.rank, latents),
        }
    }

    /// The first `tokens` rows of one head from latents, a row every `pitch`.
    fn back<T: RowElement>(
        &self,
        latents: &[f32],
        head: usize,
        tokens: usize,
        out: &mut [T],
        pitch: usize,
    ) {
        let Head { first, back } = &self.heads[head];
        let job = FromLatents {
            latents: &latents[*first..],
            stride: self.rank,
            back,
            turn: self.turns.as_ref().map(|turns| (&turns.cos[..], &turns.sin[..])),
        };
        rows_from_latents(&job, tokens, out, pitch);
    }

    /// Latents as they are stored, `[tokens, rank]`, if they are numbers that attention reads.
    pub(crate) fn stored_latents<'a>(&self, slot: &'a [u8]) -> Option<StoredRows<'a>> {
        self.inner().stored_rows(slot, self.rank)
    }

    /// The first latents of a block of `tokens` rows, times `gain`, rounded to f16: `[n, rank]`.
    pub(crate) fn decode_latents(&self, slot: &[u8], tokens: usize, gain: f32, out: &mut [f16]) {
        if gain == 1.0 && self.inner().decode_halves(slot, tokens, self.rank, out) {
            return;
        }
        SCRATCH.with_borrow_mut(|scratch| {
            self.latents(slot, tokens, out.len() / self.rank, scratch);
            scratch.latents.iter_mut().for_each(|z| *z *= gain);
            f32_to_f16(&scratch.latents, out);
        });
    }

    /// Rows of one head of sums of latents, a row of them every `stride`; of values, which are not turned. `out`:
    /// `[n, head_dim]`.
    pub(crate) fn rows_of_sums(&self, head: usize, sums: &[f32], stride: usize, out: &mut [f32]) {
        let Head { first, back } = &self.heads[head];
        let job = FromLatents { latents: &sums[*first..], stride, back, turn: None };
        rows_from_latents(&job, out.len() / self.head_dim, out, self.head_dim);
    }

    /// Plain rows of one head of a block of `tokens` rows, in f16 or f32: `[n, head_dim]`.
    pub(crate) fn decode_head<T: RowElement>(
        &self,
        slot: &[u8],
        tokens: usize,
        head: usize,
        out: &mut [T],
    ) {
        SCRATCH.with_borrow_mut(|scratch| {
            let n = out.len() / self.head_dim;
            self.latents(slot, tokens, n, scratch);
            self.back(&scratch.latents, head, n, out, self.head_dim);
        });
    }
}

impl Codec for LowRankCodec {
    fn name(&self) -> &'static str {
        "low rank"
    }

    fn slot_bytes(&self, tokens: usize, _dim: usize) -> usize {
        self.inner().slot_bytes(tokens, self.rank)
    }

    /// `rows`: `[tokens, heads · head_dim]`.
    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { latents, rows: turned, .. } = scratch;
            let tokens = rows.len() / dim;
            turned.clear();
            turned.extend_from_slice(rows);
            if let Some(Turns { cos, sin }) = &self.turns {
                let half = self.head_dim / 2;
                let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
                for (row, (cos, sin)) in turned.chunks_exact_mut(dim).zip(angles) {
                    for head in row.chunks_exact_mut(self.head_dim) {
                        let (a, b) = head.split_at_mut(half);
                        for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                            (*a, *b) = (*a * c + *b * s, *b * c - *a * s);
                        }
                    }
                }
            }
            latents.clear();
            latents.resize(tokens * self.rank, 0.0);
            let shape = (tokens, self.rank, dim);
            gemm_nn_acc(shape, turned, dim, &self.forth, self.rank, latents, self.rank);
            self.inner().encode(latents, self.rank, slot);
        });
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|scratch| {
            let n = out.len() / dim;
            self.latents(slot, tokens, n, scratch);
            for head in 0..self.heads.len() {
                self.back(&scratch.latents, head, n, &mut out[head * self.head_dim..], dim);
            }
        });
    }

    /// On rows that have the table's energies.
    fn expected_error(&self) -> f32 {
        self.lost + self.inner().expected_error()
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;
    use crate::offline::HeadGroup;

    /// Axes that are turned pairs of channels, in two groups of heads that are not in order; equal energies.
    fn axes(dim: usize, groups: &[&[usize]]) -> Axes {
        let group = |heads: &&[usize]| {
            let width = heads.len() * dim;
            let mut axes = vec![0.0; width * width];
            for i in 0..width / 2 {
                let (c, s) = (0.8, 0.6);
                axes[i * width + i] = c;
                axes[i * width + width / 2 + i] = s;
                axes[(width / 2 + i) * width + i] = -s;
                axes[(width / 2 + i) * width + width / 2 + i] = c;
            }
            HeadGroup { heads: heads.to_vec(), axes, energies: vec![1.0; width] }
        };
        Axes { groups: groups.iter().map(group).collect() }
    }

    fn turns(tokens: usize, half: usize) -> Turns {
        let angle = |i: usize| (i / half) as f32 * 0.3f32.powi((i % half) as i32);
        Turns {
            cos: (0..tokens * half).map(|i| angle(i).cos()).collect(),
            sin: (0..tokens * half).map(|i| angle(i).sin()).collect(),
        }
    }

    #[test]
    fn every_codec_of_latents_conforms() {
        let axes = axes(16, &[&[0, 2], &[1, 3]]);
        for kind in [CodecKind::F16, CodecKind::F32, CodecKind::Int8, CodecKind::Kivi4] {
            for ranks in [[32, 32], [16, 24]] {
                for turned in [false, true] {
                    let turns = turned.then(|| turns(32, 8));
                    let codec = LowRankCodec::new(&axes, &ranks, 16, turns, (kind, Part::Values));
                    let rows = conformance::gaussian(32 * 64, 3);
                    let mut slot = vec![0; codec.slot_bytes(32, 64)];
                    codec.encode(&rows, 64, &mut slot);
                    let mut out = vec![0.0; rows.len()];
                    codec.decode(&slot, 32, 64, &mut out);
                    let error: f32 = rows.iter().zip(&out).map(|(a, b)| (a - b).powi(2)).sum();
                    let error = error / rows.iter().map(|a| a * a).sum::<f32>();
                    let expected = codec.expected_error();
                    assert!(error < expected * 1.1 + 1e-6, "{kind} {ranks:?}: {error} {expected}");
                    // One head alone is that head of all.
                    for head in 0..4 {
                        let mut own = vec![0.0; 5 * 16];
                        codec.decode_head(&slot, 32, head, &mut own);
                        for (t, own) in own.chunks_exact(16).enumerate() {
                            let at = t * 64 + head * 16;
                            assert_eq!(own, &out[at..at + 16], "head {head}, row {t}");
                        }
                        let mut halves = vec![f16::NAN; 5 * 16];
                        codec.decode_head(&slot, 32, head, &mut halves);
                        for (half, x) in halves.iter().zip(&own) {
                            assert!((half.to_f32() - x).abs() < x.abs() * 0.0006 + 1e-5);
                        }
                    }
                }
            }
        }
    }

    /// What is read is the projection of what was written, before the turn.
    #[test]
    fn rows_are_projected() {
        let axes = axes(4, &[&[0]]);
        let codec = LowRankCodec::new(&axes, &[2], 4, None, (CodecKind::F32, Part::Keys));
        let row = [1.0, 2.0, 3.0, 4.0];
        let mut slot = vec![0; codec.slot_bytes(1, 4)];
        codec.encode(&row, 4, &mut slot);
        let mut out = [0.0; 4];
        codec.decode(&slot, 1, 4, &mut out);
        // Axes (.8, 0, .6, 0) and (0, .8, 0, .6).
        let (a, b) = (0.8 + 1.8, 1.6 + 2.4);
        for (x, y) in out.iter().zip([0.8 * a, 0.8 * b, 0.6 * a, 0.6 * b]) {
            assert!((x - y).abs() < 1e-6, "{out:?}");
        }
    }
}
