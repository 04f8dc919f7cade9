//! stub
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ChatTemplate;
#[derive(Debug)]
#[allow(missing_docs)]
pub struct RenderOptions;
impl ChatTemplate {
    #[allow(missing_docs)]
    pub fn for_tokenizer(_: &crate::Tokenizer) -> crate::Result<Self> {
        Ok(Self)
    }
}
