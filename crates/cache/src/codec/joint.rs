//! HOT PATH (decode). Blocks coded against the statistics that all requests share.
//!
//! `z = B · (w ∘ (x − mean))`: the mean is taken out, channels are weighted, and the basis `B` makes
//! coefficients uncorrelated over all heads of the block. Segments of 16 coefficients get bits by
//! reverse water-filling and are stored as tail-biting trellis codes with one scale per token
//! ([`kvasir_kernels::trellis`]). Attention never turns a tile back: it folds `B` into the query and
//! undoes it once on the output, so the functions here speak both languages, *coded* rows (`mean +
//! coefficients`, in the basis) and *plain* rows.

use std::cell::RefCell;
use std::sync::Arc;

use half::f16;
use kvasir_kernels::coded::{ByteBasis, ByteRows, LevelBlock};
use kvasir_kernels::trellis::{Boosts, DISTORTION, Layout, SEGMENT, STEP};
use kvasir_kernels::{AlignedBytes, Transform, f16_to_f32, gemm_nn_acc, gemm_nt};

use super::{Codec, Part};
use crate::error::{CacheError, Result};
use crate::stats::{MAX_WIDTH, PartStatistics, allocate, part_budget};

/// Bytes of a row beside its codes: its scale, and its boosted segment.
const ROW_HEADER_BITS: usize = 16;

/// Keys or values of one head group at one rate. See the module's documentation.
#[derive(Debug)]
pub struct JointCodec {
    layout: Layout,
    basis: Arc<Basis>,
    error: f32,
}

/// What codecs of all rates share.
#[derive(Debug)]
pub(crate) struct Basis {
    width: usize,
    /// The basis on its side: every product of attention and of encoding runs along coefficients.
    columns: Vec<f16>, // [channels, coefficients]
    weights: Vec<f32>,         // [width]
    inverse_weights: Vec<f32>, // [width]
    scales: Vec<f32>,          // [width / 16]
    /// The mean in the basis, by offset in the block if it turns with it: `[offsets or 1, width]`.
    means: Vec<f32>,
    /// The same in plain channels.
    plain_means: Vec<f32>,
    /// For keys: the basis and the means as bytes.
    bytes: Option<ByteBasis>,
}

/// Levels of one block on their way to rows.
#[derive(Debug)]
pub(crate) struct LevelScratch {
    levels: AlignedBytes,
    factors: Vec<f32>,    // [tokens]
    by_segment: Vec<f32>, // [segments, tokens]
    boosts: Boosts,
}

impl Default for LevelScratch {
    fn default() -> Self {
        Self {
            levels: AlignedBytes::zeroed(0),
            factors: Vec::new(),
            by_segment: Vec::new(),
            boosts: Boosts::default(),
        }
    }
}

/// What a scale of its own takes off a row's error: it follows the row's energy, which the codebooks'
/// distortion on unit Gaussians does not know of. Measured on Gaussian rows: .94 to .99.
const ROW_SCALES: f32 = 0.965;

/// Rows on their way to coefficients.
#[derive(Debug, Default)]
struct Scratch {
    transform: Transform,
    columns: Vec<f32>,
    weighted: Vec<f32>,
}

thread_local! {
    /// Sealing is rare, so it is not worth a parameter.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Basis {
    /// `means`: the plain mean as stored rows see it, `[offsets or 1, width]`.
    pub(crate) fn new(part: &PartStatistics, means: &[f32]) -> Self {
        let width = part.mean.len();
        let mut basis = Self {
            width,
            columns: transposed(&part.basis, width),
            weights: part.weights.clone(),
            inverse_weights: part.weights.iter().map(|w| 1.0 / w).collect(),
            scales: part.scales.clone(),
            means: Vec::new(),
            plain_means: means.to_vec(),
            bytes: None,
        };
        let mut columns = Vec::new();
        basis.columns_into(&mut columns);
        let mut coded = vec![0.0; means.len()];
        basis.transform(means, &columns, &mut Vec::new(), &mut coded);
        basis.means = coded;
        basis
    }

    /// The basis of keys of heads of `dim` channels, in blocks of `rows` tokens. `means` as in
    /// [`Self::new`]; `fast_pairs` as in [`ByteBasis::new`].
    pub(crate) fn for_keys(
        part: &PartStatistics,
        means: &[f32],
        (dim, rows): (usize, usize),
        fast_pairs: usize,
    ) -> Self {
        let mut basis = Self::new(part, means);
        let mut columns = Vec::new();
        basis.columns_into(&mut columns);
        let weights = basis.weights.iter().cycle();
        let weighted: Vec<f32> = means.iter().zip(weights).map(|(m, w)| m * w).collect();
        let columns = (basis.width, &columns[..]);
        basis.bytes = Some(ByteBasis::new(dim, rows, fast_pairs, columns, &weighted));
        basis
    }

    /// The statistics it was made of; means as rows at offset 0 see them. Costs a product of its size.
    pub(crate) fn statistics(&self) -> PartStatistics {
        let mut columns = Vec::new();
        self.columns_into(&mut columns);
        let coded = &self.means[..self.width];
        let mean = columns.chunks_exact(self.width).zip(&self.inverse_weights);
        let mean = mean.map(|(row, w)| w * row.iter().zip(coded).map(|(b, z)| b * z).sum::<f32>());
        PartStatistics {
            mean: mean.collect(),
            weights: self.weights.clone(),
            basis: transposed(&self.columns, self.width),
            scales: self.scales.clone(),
        }
    }

    /// What queries are folded with, if it is of keys.
    #[inline]
    pub(crate) fn byte_queries(&self) -> Option<&ByteBasis> {
        self.bytes.as_ref()
    }

    /// Sums of weighted levels as sums of coded rows: `out = scales ∘ sums + mass · mean`, for a basis
    /// with one mean. `sums`, `out`: `[width]`; `mass`: the sum of the weights.
    #[inline]
    pub(crate) fn sums_of_levels(&self, sums: &[f32], mass: f32, out: &mut [f32]) {
        let segments = sums.chunks_exact(SEGMENT).zip(self.means.chunks_exact(SEGMENT));
        let segments = segments.zip(&self.scales).zip(out.chunks_exact_mut(SEGMENT));
        for (((sums, means), scale), out) in segments {
            for ((out, sum), mean) in out.iter_mut().zip(sums).zip(means) {
                *out = scale * STEP * sum + mass * mean;
            }
        }
    }

    /// Coefficients of plain rows, the mean taken out.
    fn coefficients(&self, x: &[f32], scratch: &mut Scratch, out: &mut [f32]) {
        if Transform::is_available() {
            scratch.transform.load(&self.columns, &self.weights);
            return scratch.transform.apply(x, &self.plain_means, out);
        }
        self.columns_into(&mut scratch.columns);
        self.transform(x, &scratch.columns, &mut scratch.weighted, out);
        let means = self.means.chunks_exact(self.width).cycle();
        for (row, mean) in out.chunks_exact_mut(self.width).zip(means) {
            row.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
        }
    }

    /// `out = B (w ∘ x)` for rows of `x`. `columns`: what [`Self::columns_into`] gives.
    fn transform(&self, x: &[f32], columns: &[f32], weighted: &mut Vec<f32>, out: &mut [f32]) {
        weighted.clear();
        for row in x.chunks_exact(self.width) {
            weighted.extend(row.iter().zip(&self.weights).map(|(x, w)| x * w));
        }
        let shape = (x.len() / self.width, self.width, self.width);
        out.fill(0.0);
        gemm_nn_acc(shape, weighted, self.width, columns, self.width, out, self.width);
    }

    /// Bytes it takes.
    pub(crate) fn num_bytes(&self) -> usize {
        let bytes = self.bytes.as_ref().map_or(0, ByteBasis::num_bytes);
        bytes
            + 2 * self.columns.len()
            + 4 * (2 * self.weights.len() + self.scales.len() + self.means.len())
    }

    /// The basis as f32, `[channels, coefficients]`.
    pub(crate) fn columns_into(&self, out: &mut Vec<f32>) {
        out.resize(self.columns.len(), 0.0);
        f16_to_f32(&self.columns, out);
    }

    /// What blocks are turned back with, as bytes.
    pub(crate) fn rows_into(&self, dim: usize, rows: &mut ByteRows) {
        rows.load(dim, &self.columns, &self.inverse_weights);
    }

    /// Channels of a block.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Reciprocal weights of the channels of one head.
    pub(crate) fn inverse_weights(&self, head: usize, dim: usize) -> &[f32] {
        &self.inverse_weights[head * dim..(head + 1) * dim]
    }
}

fn transposed(rows: &[f16], width: usize) -> Vec<f16> {
    let column = |channel: usize| rows[channel..].iter().step_by(width).copied();
    (0..width).flat_map(column).collect()
}

impl JointCodec {
    /// The codec of one of two parts that together store at most `rate` bits a channel, row headers
    /// included; of its own bits only a `share`, where some of its channels are not stored.
    ///
    /// # Errors
    /// [`CacheError::Statistics`] if the basis is wider than a row can be.
    pub(crate) fn new(basis: Arc<Basis>, rate: f32, share: f32, part: Part) -> Result<Self> {
        let bits = (rate * basis.width as f32) as usize;
        let budget = bits.saturating_sub(ROW_HEADER_BITS) / SEGMENT;
        let budget = (part_budget(part, basis.width, budget) as f32 * share).round() as usize;
        let bits = allocate(&basis.scales, budget);
        Self::with_bits(basis, bits)
    }

    /// A codec with given bits for every segment.
    pub(crate) fn with_bits(basis: Arc<Basis>, bits: Vec<u8>) -> Result<Self> {
        let width = basis.width;
        let layout = Layout::new(bits, basis.scales.clone()).ok_or_else(|| {
            CacheError::Statistics { what: format!("a block cannot be {width} channels wide") }
        })?;
        let energy: f32 = basis.scales.iter().map(|s| s * s).sum();
        let bits = layout.bits().iter().map(|b| usize::from(*b)).zip(&basis.scales);
        let left: f32 = bits.map(|(b, s)| s * s * DISTORTION[b]).sum();
        Ok(Self { layout, error: ROW_SCALES * left / energy, basis })
    }

    pub(crate) fn basis(&self) -> &Arc<Basis> {
        &self.basis
    }

    /// [`Codec::expected_error`], worked out once.
    pub(crate) fn codec_error(&self) -> f32 {
        self.error
    }

    fn mean_stride(&self) -> usize {
        if self.basis.means.len() == self.basis.width { 0 } else { self.basis.width }
    }

    /// Coded rows: `gain` times the coefficients, plus the mean. `slot`: a block of `tokens` rows; `out`:
    /// `[n, width]`, the first `n` of them.
    #[inline]
    pub(crate) fn decode_coded(&self, slot: &[u8], tokens: usize, gain: f32, out: &mut [f32]) {
        let (width, means) = (self.basis.width, &self.basis.means);
        let n = out.len() / width;
        let slot = &slot[..self.layout.slot_bytes(tokens)];
        self.layout.decode(slot, n, gain, means, self.mean_stride(), out, width);
    }

    /// Coefficients without the mean: what [`Self::coefficients`] gave, as it was stored. `slot`: a block of
    /// `tokens` rows; `out`: `[n, width]`, the first `n` of them.
    pub(crate) fn decode_coefficients(&self, slot: &[u8], tokens: usize, out: &mut [f32]) {
        const NO_MEAN: [f32; MAX_WIDTH] = [0.0; MAX_WIDTH];
        let width = self.basis.width;
        let slot = &slot[..self.layout.slot_bytes(tokens)];
        self.layout.decode(slot, out.len() / width, 1.0, &NO_MEAN[..width], 0, out, width);
    }

    /// Stores coefficients. `z`: `[tokens, width]`.
    pub(crate) fn encode_coefficients(&self, z: &[f32], slot: &mut [u8]) {
        let bytes = self.layout.slot_bytes(z.len() / self.basis.width);
        self.layout.encode(z, &mut slot[..bytes]);
    }

    /// What a block of `tokens` rows takes of its slot.
    pub(crate) fn stored<'a>(&self, slot: &'a [u8], tokens: usize) -> &'a [u8] {
        &slot[..self.layout.slot_bytes(tokens)]
    }

    /// Segments up to the last that has bits.
    pub(crate) fn used_segments(&self) -> usize {
        self.layout.used_segments()
    }

    /// How rows are stored.
    #[inline]
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Plain rows of one head of a block of `tokens` rows. `columns`: what [`Basis::columns_into`] gives; `coded`: scratch; `out`:
    /// `[n, dim]`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn decode_head(
        &self,
        slot: &[u8],
        tokens: usize,
        gain: f32,
        head: usize,
        dim: usize,
        columns: &[f32],
        coded: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let width = self.basis.width;
        let n = out.len() / dim;
        coded.resize(n * width, 0.0);
        self.decode_coded(slot, tokens, gain, coded);
        let columns = &columns[head * dim * width..];
        gemm_nt((n, dim, width), coded, width, columns, width, out, dim);
        for row in out.chunks_exact_mut(dim) {
            let weights = self.basis.inverse_weights(head, dim);
            row.iter_mut().zip(weights).for_each(|(x, w)| *x *= w);
        }
    }

    /// Plain rows of one head of a block of `tokens` rows, by products of bytes. `rows`: what
    /// [`Basis::rows_into`] gives; `out`: `[tokens, dim]`.
    pub(crate) fn decode_bytes(
        &self,
        slot: &[u8],
        gain: f32,
        (head, dim, tokens): (usize, usize, usize),
        rows: &ByteRows,
        scratch: &mut LevelScratch,
        out: &mut [f32],
    ) {
        let segments = self.used_segments();
        let LevelScratch { levels, factors, by_segment, boosts } = scratch;
        let slot = self.stored(slot, tokens);
        if levels.len() < segments * SEGMENT * tokens {
            *levels = AlignedBytes::zeroed(self.basis.width * tokens);
        }
        factors.resize(tokens, 0.0);
        by_segment.resize(segments * tokens, 0.0);
        self.layout.levels(slot, tokens, segments, levels.as_mut_slice());
        self.layout.row_factors(slot, factors, boosts);
        self.layout.segment_factors(factors, boosts, segments, by_segment);
        let block = LevelBlock {
            levels: levels.as_slice(),
            factors: by_segment,
            tokens,
            segments,
            gain,
            means: &self.basis.plain_means[head * dim..],
            mean_stride: self.mean_stride(),
        };
        rows.turn_back(head, &block, out);
    }

    /// Coefficients of plain rows, the mean taken out. `rows`, `out`: `[n, width]`.
    pub(crate) fn coefficients(&self, rows: &[f32], out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|scratch| self.basis.coefficients(rows, scratch, out));
    }
}

impl Codec for JointCodec {
    fn name(&self) -> &'static str {
        "joint"
    }

    fn slot_bytes(&self, tokens: usize, _dim: usize) -> usize {
        self.layout.slot_bytes(tokens)
    }

    /// `rows`: `[tokens, width]`; `dim` is the width.
    fn encode(&self, rows: &[f32], _dim: usize, slot: &mut [u8]) {
        let mut z = vec![0.0; rows.len()];
        self.coefficients(rows, &mut z);
        self.encode_coefficients(&z, slot);
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let mut coded = vec![0.0; out.len()];
        self.decode_coded(slot, tokens, 1.0, &mut coded);
        let mut columns = Vec::new();
        self.basis.columns_into(&mut columns);
        gemm_nt((out.len() / dim, dim, dim), &coded, dim, &columns, dim, out, dim);
        for row in out.chunks_exact_mut(dim) {
            row.iter_mut().zip(&self.basis.inverse_weights).for_each(|(x, w)| *x *= w);
        }
    }

    /// On rows that have exactly the statistics: what the bits leave, over all energy.
    fn expected_error(&self) -> f32 {
        self.error
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::conformance;
    use super::*;

    /// Uncorrelated channels whose energies fall by a factor of 1000 from the first segment to the last;
    /// Gaussian rows with exactly these statistics, and a mean.
    fn example(
        width: usize,
        spread: f32,
        mean: f32,
    ) -> (Arc<Basis>, impl Fn(usize, u64) -> Vec<f32>) {
        let segments = width / SEGMENT;
        let scales: Vec<f32> =
            (0..segments).map(|i| spread.powf(-(i as f32) / segments as f32)).collect();
        let basis =
            (0..width * width).map(|i| f16::from_f32(f32::from(u8::from(i / width == i % width))));
        let part = PartStatistics {
            mean: (0..width).map(|c| mean * ((c % 5) as f32 - 2.0)).collect(),
            weights: vec![1.0; width],
            basis: basis.collect(),
            scales: scales.clone(),
        };
        let mean = part.mean.clone();
        let rows = move |tokens: usize, seed: u64| {
            let mut rows = conformance::gaussian(tokens * width, seed);
            for (i, x) in rows.iter_mut().enumerate() {
                *x = *x * scales[i % width / SEGMENT] + mean[i % width];
            }
            rows
        };
        (Arc::new(Basis::new(&part, &part.mean)), rows)
    }

    #[test]
    fn distortion_is_what_the_allocation_predicts() {
        for (width, spread) in [(64, 30.0), (192, 30.0), (256, 5.0)] {
            let (basis, rows) = example(width, spread, 1.0);
            for rate in [1.5, 2.0, 2.75, 3.0, 4.0] {
                let codec = JointCodec::new(Arc::clone(&basis), rate, 1.0, Part::Keys).unwrap();
                let x = rows(512, 17);
                let (mut z, mut got) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                codec.coefficients(&x, &mut z);
                let mut slot = vec![0; codec.slot_bytes(512, width)];
                codec.encode(&x, width, &mut slot);
                codec.decode_coefficients(&slot, 512, &mut got);
                let error: f32 = z.iter().zip(&got).map(|(a, b)| (a - b).powi(2)).sum();
                let error = error / z.iter().map(|a| a * a).sum::<f32>();
                let ratio = error / codec.expected_error();
                println!("width {width} rate {rate}: {error:.5}, {ratio:.3} of the prediction");
                assert!((ratio - 1.0).abs() < 0.05, "width {width} rate {rate}: {ratio}");
            }
        }
    }

    #[test]
    fn conforms() {
        let (basis, _) = example(192, 1.0, 0.0);
        let codec = JointCodec::new(basis, 4.0, 1.0, Part::Keys).unwrap();
        conformance::check_shapes(&codec, &[(16, 192), (32, 192), (64, 192)]);
    }

    #[test]
    fn a_rate_is_never_exceeded() {
        for width in [16, 48, 64, 192, 256] {
            let (basis, _) = example(width, 10.0, 1.0);
            for hundredths in (100..=600).step_by(25) {
                let rate = hundredths as f32 / 100.0;
                let bits = [Part::Keys, Part::Values].map(|part| {
                    let codec = JointCodec::new(Arc::clone(&basis), rate, 1.0, part).unwrap();
                    8.0 * codec.slot_bytes(32, width) as f32 / (32 * width) as f32
                });
                let bits = (bits[0] + bits[1]) / 2.0;
                let most = rate.max(ROW_HEADER_BITS as f32 / width as f32);
                assert!(bits <= most, "{bits} bits a channel at {rate}, width {width}");
                assert!(
                    rate > 5.0 || bits > most - 16.0 / width as f32 - 1.0 / 16.0,
                    "{bits} {rate}"
                );
            }
        }
    }

    #[test]
    fn gain_scales_what_is_not_the_mean() {
        let (basis, rows) = example(64, 3.0, 1.0);
        let codec = JointCodec::new(basis, 4.0, 1.0, Part::Keys).unwrap();
        let x = rows(16, 5);
        let mut slot = vec![0; codec.slot_bytes(16, 64)];
        codec.encode(&x, 64, &mut slot);
        let [once, twice, none] = [1.0, 2.0, 0.0].map(|gain| {
            let mut out = vec![0.0; x.len()];
            codec.decode_coded(&slot, 16, gain, &mut out);
            out
        });
        for ((a, b), mean) in once.iter().zip(&twice).zip(&none) {
            assert!(((b - mean) - 2.0 * (a - mean)).abs() < 1e-4, "{a} {b} {mean}");
        }
    }
}
