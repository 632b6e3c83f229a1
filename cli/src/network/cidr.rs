//! The address that moves, as it is given to `--ip`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct Cidr {
    /// The address.
    pub(crate) ip: IpAddr,
    /// Length of the prefix in bits, 1 to 32 or 128.
    pub(crate) prefix: u8,
}

impl Cidr {
    /// Whether `other` is in the same network.
    pub(crate) fn holds(self, other: IpAddr) -> bool {
        match (self.ip, other) {
            (IpAddr::V4(ip), IpAddr::V4(other)) => {
                (ip.to_bits() ^ other.to_bits()).leading_zeros() >= u32::from(self.prefix)
            }
            (IpAddr::V6(ip), IpAddr::V6(other)) => {
                (ip.to_bits() ^ other.to_bits()).leading_zeros() >= u32::from(self.prefix)
            }
            _ => false,
        }
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ip, prefix) = text.split_once('/').ok_or_else(|| {
            let example = if text.contains(':') { 64 } else { 24 };
            format!("{text} has no prefix length: write {text}/{example} for example")
        })?;
        if let Some((_, zone)) = ip.split_once('%') {
            return Err(format!("{ip} holds for {zone} of one host only: give one without a zone"));
        }
        let address: IpAddr = ip.parse().map_err(|_| format!("{ip} is no IP address"))?;
        let (name, most) = if address.is_ipv4() { ("IPv4", 32) } else { ("IPv6", 128) };
        let prefix: u8 = prefix.parse().unwrap_or(0);
        if !(1..=most).contains(&prefix) {
            return Err(format!("the prefix length of an {name} address is 1 to {most}"));
        }
        if let Some(reason) = unfit(address) {
            return Err(format!("{ip} cannot be handed over: {reason}"));
        }
        Ok(Self { ip: address, prefix })
    }
}

/// Why no address like `ip` can move.
fn unfit(ip: IpAddr) -> Option<String> {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Some("it is no host's address".to_owned());
    }
    let IpAddr::V6(v6) = ip else { return None };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return Some(format!("it is an IPv4 address in another form: write {v4}"));
    }
    v6.is_unicast_link_local().then(|| {
        "it is link-local, and its clients' connections hold for one interface of theirs: give a \
         global address or a unique local one (fd00::/8)"
            .to_owned()
    })
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_refused_with_the_cure() {
        for (text, part) in [
            ("10.0.0.1", "10.0.0.1/24"),
            ("fd00::5", "fd00::5/64"),
            ("10.0.0/24", "no IP address"),
            ("fd00:5/64", "no IP address"),
            ("10.0.0.1/0", "1 to 32"),
            ("10.0.0.1/33", "1 to 32"),
            ("fd00::5/0", "1 to 128"),
            ("fd00::5/129", "1 to 128"),
            ("fd00::5/x", "1 to 128"),
            ("127.0.0.1/8", "cannot be handed over"),
            ("::1/128", "no host's address"),
            ("::/64", "no host's address"),
            ("ff02::1/64", "no host's address"),
            ("fe80::1/64", "link-local"),
            ("fe80::1%eth0/64", "without a zone"),
            ("::ffff:10.0.0.1/120", "write 10.0.0.1"),
        ] {
            let error = text.parse::<Cidr>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn both_families_are_read_and_written() {
        for text in ["10.77.0.100/24", "fd00::5/64", "2001:db8::1/128"] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        let long: Cidr = "FD00:0:0:0:0:0:0:5/64".parse().unwrap();
        assert_eq!(long.to_string(), "fd00::5/64");
    }

    #[test]
    fn a_network_holds_its_own_addresses_only() {
        for (cidr, other, held) in [
            ("10.77.0.100/24", "10.77.0.2", true),
            ("10.77.0.100/24", "10.78.0.2", false),
            ("10.77.0.100/32", "10.77.0.101", false),
            ("10.77.0.100/1", "10.77.0.2", true),
            ("10.77.0.100/24", "fd00::2", false),
            ("fd00::5/64", "fd00::2", true),
            ("fd00::5/64", "fd00:0:0:1::5", false),
            ("fd00::5/128", "fd00::4", false),
            ("fd00::5/64", "10.77.0.2", false),
        ] {
            let network: Cidr = cidr.parse().unwrap();
            assert_eq!(network.holds(other.parse().unwrap()), held, "{cidr} {other}");
        }
    }
}
