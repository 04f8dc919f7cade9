//! Tiles, where no processor has them: a type without a value.

/// See the module for x86-64.
pub(crate) enum Amx {}

impl Amx {
    pub(crate) unsafe fn new(_rows: usize) -> Self {
        unreachable!("no set has tiles here")
    }

    pub(crate) fn rows(&self) -> usize {
        match *self {}
    }

    pub(crate) fn multiply_only(&self, _rounds: usize) {
        match *self {}
    }

    pub(crate) unsafe fn add_products(
        &self,
        _weights: *const u16,
        _inputs: *const u16,
        _groups: usize,
        _sums: *mut f32,
        _begin: bool,
    ) {
        match *self {}
    }

    pub(crate) unsafe fn add_products_of_two(
        &self,
        _weights: *const u16,
        _inputs: [*const u16; 2],
        _groups: usize,
        _sums: [*mut f32; 2],
        _begin: bool,
    ) {
        match *self {}
    }
}
