//! Keeps an address silent: no packet and no ARP for it or from it passes this host.
//!
//! The same rules serve both ends of a move. On the source they are the container's connection
//! lock: from before the freeze until the address has left, the kernel must neither acknowledge
//! data that the dump no longer sees nor answer with a reset. On the destination they keep the
//! address quiet until the restored sockets are there. All rules are in two nftables tables that
//! carry the migration's id, so that removing them can never touch anybody else's.

use std::net::Ipv4Addr;
use std::process::Command;

/// Before every ordinary filter.
const PRIORITY: i32 = -300;

/// Name of the tables of `migration`.
pub fn table(migration: &str) -> String {
    format!("ferry-{migration}")
}

/// The command that silences `addresses`, in one transaction.
pub fn add(migration: &str, addresses: &[Ipv4Addr]) -> Command {
    nft(add_script(migration, addresses))
}

/// The command that removes the rules of `migration`; no error when there are none.
pub fn remove(migration: &str) -> Command {
    nft(remove_script(migration))
}

/// The command that lets packets of the address pass again, while ARP stays silent: neighbours are
/// told of the address only once it is announced.
pub fn open(migration: &str) -> Command {
    let table = table(migration);
    nft(format!("add table inet {table}; delete table inet {table}"))
}

/// The command that lists the names of all tables; see [`migrations_in`].
pub fn list() -> Command {
    nft("list tables".to_owned())
}

/// The migrations that have tables in the output of [`list`].
pub fn migrations_in(listing: &str) -> Vec<String> {
    let mut found: Vec<String> = listing
        .lines()
        .filter_map(|line| line.split_whitespace().last()?.strip_prefix("ferry-"))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    found
}

fn nft(script: String) -> Command {
    let mut command = Command::new("nft");
    command.arg(script);
    command
}

fn add_script(migration: &str, addresses: &[Ipv4Addr]) -> String {
    let table = table(migration);
    let set = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut script = remove_script(migration);
    for (family, priority, from, to) in
        [("inet", PRIORITY, "ip saddr", "ip daddr"), ("arp", 0, "arp saddr ip", "arp daddr ip")]
    {
        script += &format!(
            "add table {family} {table}; \
             add chain {family} {table} in {{ type filter hook input priority {priority}; }}; \
             add chain {family} {table} out {{ type filter hook output priority {priority}; }}; \
             add rule {family} {table} in {to} {{ {set} }} drop; \
             add rule {family} {table} out {from} {{ {set} }} drop; "
        );
    }
    script
}

/// Adding a table that exists is no error, deleting one that does not is: so add, then delete.
fn remove_script(migration: &str) -> String {
    let table = table(migration);
    ["inet", "arp"]
        .map(|family| format!("add table {family} {table}; delete table {family} {table}; "))
        .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_in_a_table_of_the_migration() {
        let script = add_script("m-12345678", &[Ipv4Addr::new(10, 0, 0, 1)]);
        for statement in script.split("; ").filter(|s| s.starts_with("add rule")) {
            assert!(statement.contains(" ferry-m-12345678 "), "{statement}");
            assert!(statement.contains("{ 10.0.0.1 }"), "{statement}");
        }
        assert_eq!(script.matches("add rule").count(), 4);
    }

    #[test]
    fn only_our_tables_are_listed() {
        let listing = "table inet ferry-abc\ntable arp ferry-abc\ntable ip nat\n";
        assert_eq!(migrations_in(listing), ["abc"]);
    }
}
