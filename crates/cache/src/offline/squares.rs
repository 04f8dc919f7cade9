//! Second moments of keys before RoPE, and of values, over all KV heads of a layer.

use kvasir_kernels::gemm_nt;

use crate::error::{CacheError, Result};
use crate::geometry::Geometry;
use crate::offline::Method;

/// Adds up over texts.
#[derive(Debug)]
pub struct Squares {
    geometry: Geometry,
    tokens: usize,
    /// By layer, of keys and of values: `[width, width]` each.
    sums: Vec<[Vec<f64>; 2]>,
}

impl Squares {
    /// Nothing seen yet.
    pub fn new(geometry: Geometry) -> Self {
        let width = |l: &crate::geometry::LayerGeometry| l.kv_heads * l.head_dim;
        let zeros = |l| [0, 1].map(|_| vec![0.0; width(l) * width(l)]);
        let sums = geometry.layers().iter().map(zeros).collect();
        Self { geometry, tokens: 0, sums }
    }

    /// Adds one layer's rows of one text. `keys` (not rotated) and `values`: `[rows, kv_heads, head_dim]`. O(rows · width²).
    pub fn observe(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let l = &self.geometry.layers()[layer];
        let width = l.kv_heads * l.head_dim;
        let rows = keys.len() / width;
        if layer == 0 {
            self.tokens += rows;
        }
        // Channel by channel, so that products run along tokens.
        let (mut columns, mut product) = (vec![0.0; width * rows], vec![0.0; width * width]);
        for (x, sums) in [keys, values].into_iter().zip(&mut self.sums[layer]) {
            for (t, row) in x.chunks_exact(width).enumerate() {
                for (c, x) in row.iter().enumerate() {
                    columns[c * rows + t] = *x;
                }
            }
            let shape = (width, width, rows);
            gemm_nt(shape, &columns, rows, &columns, rows, &mut product, width);
            sums.iter_mut().zip(&product).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }

    /// Means over tokens.
    ///
    /// # Errors
    /// [`CacheError::Table`] if fewer tokens were seen than there are channels, or values that are not finite.
    pub fn finish(self, method: Method) -> Result<Vec<[Vec<f64>; 2]>> {
        let wrong = |what| Err(CacheError::Table { method: method.name(), what });
        let width = self.geometry.layers().iter().map(|l| l.kv_heads * l.head_dim).max();
        let width = width.unwrap_or(0);
        if self.tokens < width {
            return wrong(format!("{} tokens are too few to show {width} directions", self.tokens));
        }
        let finite = |parts: &[Vec<f64>; 2]| parts.iter().flatten().all(|x| x.is_finite());
        if let Some(layer) = self.sums.iter().position(|parts| !finite(parts)) {
            return wrong(format!("keys or values of layer {layer} are not finite"));
        }
        let by = 1.0 / self.tokens.max(1) as f64;
        let mean = |parts: [Vec<f64>; 2]| {
            parts.map(|part| part.into_iter().map(|x| x * by).collect::<Vec<_>>())
        };
        Ok(self.sums.into_iter().map(mean).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::layer;

    #[test]
    fn moments_are_means_over_all_texts() {
        let geometry = Geometry::new(vec![layer(1, 1, 2)], 32).unwrap();
        let mut squares = Squares::new(geometry.clone());
        squares.observe(0, &[1.0, 2.0], &[0.0, 1.0]);
        squares.observe(0, &[3.0, -1.0, 0.0, 1.0], &[1.0, 1.0, 2.0, 0.0]);
        let [keys, values] = squares.finish(Method::ReCalKv).unwrap().remove(0);
        assert_eq!(keys.iter().map(|x| x * 3.0).collect::<Vec<_>>(), [10.0, -1.0, -1.0, 6.0]);
        assert_eq!(values.iter().map(|x| x * 3.0).collect::<Vec<_>>(), [5.0, 1.0, 1.0, 2.0]);
        let mut few = Squares::new(geometry);
        few.observe(0, &[1.0, 2.0], &[0.0, 1.0]);
        let error = few.finish(Method::ReCalKv).unwrap_err().to_string();
        assert_eq!(error, "table of recalkv: 1 tokens are too few to show 2 directions");
    }
}
