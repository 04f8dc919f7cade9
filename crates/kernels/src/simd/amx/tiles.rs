//! Tiles, where the processor has them.

use std::arch::asm;
use std::marker::PhantomData;

use super::ROWS;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles of this thread, configured for products of 16 features with some rows: 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs.
/// Freed when it is dropped: tiles in use make switches of threads slower.
pub(crate) struct Amx {
    /// Of this thread alone.
    not_send: PhantomData<*const ()>,
    rows: usize,
}

impl Amx {
    /// For 1 to 16 rows.
    ///
    /// # Safety
    /// The processor has tiles, and the system granted them ([`super::is_granted`]).
    pub(crate) unsafe fn new(rows: usize) -> Self {
        debug_assert!((1..=ROWS).contains(&rows));
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.rows[..8].fill(ROWS as u8);
        config.row_bytes[..8].fill(4 * rows as u16);
        config.row_bytes[4..6].fill(64);
        // SAFETY: by contract; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self { not_send: PhantomData, rows }
    }

    /// Rows of a tile.
    #[inline]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// So many products of tiles, of zeros, in four chains: what can be had at most.
    pub(crate) fn multiply_only(&self, rounds: usize) {
        // SAFETY: the tiles are configured, and no memory is touched.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "tilezero tmm6",
                "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) (rounds / 4).max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack)
            );
        }
    }

    /// Adds the products of 32 features with a block of rows to `sums`, or puts them there (`begin`). `weights`: `[groups, 2 halves, 16 features, 32 inputs]`;
    /// `inputs`: `[groups, 16 pairs, rows, 2]`; `sums`: `[2 halves, 16 features, 16 rows]`, of one row `[2, 16 features]` with
    /// room for [`super::SUMS`] each.
    ///
    /// # Safety
    /// They are there, and one group at least.
    #[inline(always)]
    pub(crate) unsafe fn add_products(
        &self,
        weights: *const u16,
        inputs: *const u16,
        groups: usize,
        sums: *mut f32,
        begin: bool,
    ) {
        // One row's sums follow each other.
        let sum_bytes: usize = if self.rows == 1 { 4 } else { 64 };
        // SAFETY: by contract; the tiles are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "test {begin}, {begin}",
                "jnz 2f",
                "tileloadd tmm0, [{sums} + {sum_bytes}]",
                "tileloadd tmm1, [{sums} + {sum_bytes} + 1024]",
                "2:",
                "tileloadd tmm4, [{weights} + {row}]",
                "tileloadd tmm6, [{inputs} + {input_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{weights} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "add {weights}, 2048",
                "add {inputs}, {input_group}",
                "dec {groups}",
                "jnz 2b",
                "tilestored [{sums} + {sum_bytes}], tmm0",
                "tilestored [{sums} + {sum_bytes} + 1024], tmm1",
                weights = inout(reg) weights => _,
                inputs = inout(reg) inputs => _,
                groups = inout(reg) groups => _,
                sums = in(reg) sums,
                sum_bytes = in(reg) sum_bytes,
                begin = in(reg) usize::from(begin),
                row = in(reg) 64_usize,
                input_row = in(reg) 4 * self.rows,
                input_group = in(reg) 64 * self.rows,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack)
            );
        }
    }

    /// The same of two blocks of 16 rows.
    ///
    /// # Safety
    /// As [`Self::add_products`].
    #[inline(always)]
    pub(crate) unsafe fn add_products_of_two(
        &self,
        weights: *const u16,
        inputs: [*const u16; 2],
        groups: usize,
        sums: [*mut f32; 2],
        begin: bool,
    ) {
        // SAFETY: by contract; the tiles are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {begin}, {begin}",
                "jnz 2f",
                "tileloadd tmm0, [{first_sums} + {row}]",
                "tileloadd tmm1, [{first_sums} + {row} + 1024]",
                "tileloadd tmm2, [{second_sums} + {row}]",
                "tileloadd tmm3, [{second_sums} + {row} + 1024]",
                "2:",
                "tileloadd tmm4, [{weights} + {row}]",
                "tileloadd tmm6, [{first} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{weights} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tileloadd tmm7, [{second} + {row}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {weights}, 2048",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {groups}",
                "jnz 2b",
                "tilestored [{first_sums} + {row}], tmm0",
                "tilestored [{first_sums} + {row} + 1024], tmm1",
                "tilestored [{second_sums} + {row}], tmm2",
                "tilestored [{second_sums} + {row} + 1024], tmm3",
                weights = inout(reg) weights => _,
                first = inout(reg) inputs[0] => _,
                second = inout(reg) inputs[1] => _,
                groups = inout(reg) groups => _,
                first_sums = in(reg) sums[0],
                second_sums = in(reg) sums[1],
                begin = in(reg) usize::from(begin),
                row = in(reg) 64_usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: there were tiles to configure.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
