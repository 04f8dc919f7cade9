//! API keys: kept as hashes, compared in constant time.

use subtle::{Choice, ConstantTimeEq};

use crate::ServerError;

/// The keys a client may present. Only their hashes are kept.
#[derive(Clone, Default)]
pub struct ApiKeys {
    hashes: Vec<[u8; 32]>,
}

/// Which key a request came with; the boundary of what prefix caching shares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tenant(pub(crate) Option<String>);

impl ApiKeys {
    /// No keys: everybody may do everything. An empty key is refused, because it is more likely
    /// an unset variable than a wish.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Result<Self, ServerError> {
        let mut hashes = Vec::new();
        for key in keys {
            if key.as_ref().trim().is_empty() {
                return Err(ServerError::BadConfig {
                    option: "--api-key",
                    expected: "a non-empty text",
                    found: "an empty one".into(),
                });
            }
            hashes.push(hash(key.as_ref()));
        }
        Ok(Self { hashes })
    }

    /// Whether requests need a key.
    pub fn required(&self) -> bool {
        !self.hashes.is_empty()
    }

    /// The tenant of the key in an `Authorization` header, or `None` if it is none of ours.
    /// Every key is compared, whichever matches, and hashes have one length: the time taken
    /// tells nothing about the keys.
    pub(crate) fn check(&self, authorization: &str) -> Option<Tenant> {
        let given = hash(bearer(authorization)?);
        let mut known = Choice::from(0);
        for key in &self.hashes {
            known |= key.ct_eq(&given);
        }
        // A hash of the hash: the name is put into block hashes, the key's own hash is not.
        bool::from(known).then(|| Tenant(Some(blake3::hash(&given).to_hex()[..16].to_owned())))
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.hashes.len())
    }
}

impl Tenant {
    /// The prefix cache's salt for a request of this tenant that asks for `cache_salt`. The
    /// tenant's name has a fixed length, so no salt can spell another tenant's.
    pub(crate) fn salt(&self, cache_salt: Option<&str>) -> Option<String> {
        match (&self.0, cache_salt) {
            (None, None) => None,
            (None, Some(salt)) => Some(salt.to_owned()),
            (Some(name), salt) => Some(format!("{name}:{}", salt.unwrap_or_default())),
        }
    }
}

fn hash(key: &str) -> [u8; 32] {
    *blake3::hash(key.as_bytes()).as_bytes()
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, key) = authorization.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_keys_and_no_others() {
        let keys = ApiKeys::new(["alpha", "beta"]).unwrap();
        let alpha = keys.check("Bearer alpha").unwrap();
        let beta = keys.check("bearer  beta ").unwrap();
        assert_ne!(alpha, beta);
        assert_eq!(alpha, keys.check("BEARER alpha").unwrap());
        for wrong in ["Bearer gamma", "Bearer ", "Bearer", "alpha", "Basic alpha", "Bearer alph"] {
            assert_eq!(keys.check(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn refuses_empty_keys_and_hides_the_others() {
        assert!(ApiKeys::new([" "]).is_err());
        assert!(!ApiKeys::default().required());
        assert_eq!(format!("{:?}", ApiKeys::new(["secret"]).unwrap()), "ApiKeys(1)");
    }

    #[test]
    fn salts_keep_tenants_apart() {
        let keys = ApiKeys::new(["alpha", "beta"]).unwrap();
        let (a, b) = (keys.check("Bearer alpha").unwrap(), keys.check("Bearer beta").unwrap());
        assert_ne!(a.salt(None), b.salt(None));
        assert_ne!(a.salt(Some("x")), a.salt(None));
        assert_eq!(Tenant(None).salt(None), None);
        assert_eq!(Tenant(None).salt(Some("x")), Some("x".into()));
    }
}
