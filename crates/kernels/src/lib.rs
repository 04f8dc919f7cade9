//! CPU kernels: linear layers, norms, RoPE, softmax, conversions.
//!
//! Owns every `unsafe` that SIMD needs. A kernel is written once, over the registers of an instruction set, and compiled for
//! each [`Set`] that makes a difference for it; which of them may be used says [`Isa::best`]. Arrays define what registers do, and are
//! what tests compare them with.
//!
//! **Row invariance.** The result for one row (token, query) never depends on how many other rows
//! are computed with it: every output element is one chain of operations in a fixed order. So a
//! greedy sequence gets bit-equal logits alone, in any batch, and in any chunking of its prefill.
//! A new kernel must keep this; `gemm::tests::rows_do_not_depend_on_the_batch` shows how it is
//! checked.
//!
//! Kernels that use threads run on the *current* team: call them inside [`Threads::run`].
#![allow(unsafe_code)]

mod activation;
mod aligned;
mod arena;
mod attention;
mod channels;
pub mod coded;
mod codes;
mod convert;
mod elementwise;
mod gemm;
mod isa;
mod linear;
mod lines;
mod low_rank;
mod norm;
mod peak;
mod rope;
mod simd;
mod softmax;
mod spill;
mod threads;
mod transform;
pub mod trellis;

pub use activation::{Activation, gelu, gelu_with_slopes};
pub use aligned::AlignedBytes;
pub use arena::Arena;
pub use attention::{
    BYTE_GROUP, BlockScratch, KvBlock, ManyRows, Products, QueryLanes, QueryRows, StoredRows,
    add_columns, attend_block, has_integers, merge_rows,
};
pub use channels::expand_channels;
pub use codes::{ScaleAxis, expand_bytes, expand_codes};
pub use convert::{f16_to_f32, f32_to_f16, scale_bytes_to_f32};
pub use elementwise::{add_assign, num_beyond, scale_in_place, soft_cap};
pub use gemm::{gemm_nn_acc, gemm_nt};
pub use isa::{ISA_VARIABLE, Isa, IsaError, Set};
pub use linear::{
    ActivationKind, Activations, CodeFormat, FloatFormat, GROUP, GroupCodes, IQ4_LEVELS, KFormat,
    KGroup, Linear, MXFP4_LEVELS, SUPERBLOCK, forward_all, forward_gated,
};
pub use low_rank::{BackMatrix, FromLatents, RowElement, rows_from_latents};
pub use norm::{rms_norm, rms_norm_rows};
pub use peak::{Product, peak_operations, peak_read_bytes};
pub use rope::{RopeScaling, RopeTable, rotate, rotate_into};
pub use softmax::{OnlineSoftmax, argmax, log_sum_exp};
pub use spill::{Spill, SpillWriter};
pub use threads::{Threads, ThreadsError, num_threads, parallel_for, parallel_zip};
pub use transform::Transform;
