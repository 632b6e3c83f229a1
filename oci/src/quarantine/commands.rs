//! The rules by nft(8): commands for a caller that runs them itself. They know the tables that
//! [`super::Prepared`] and [`super::Hold`] make.

use std::net::Ipv4Addr;
use std::process::Command;

use super::{PREFIX, table};

/// Before every ordinary filter.
const PRIORITY: i32 = -300;

/// The command that silences `addresses`, in one transaction.
pub fn add(migration: &str, addresses: &[Ipv4Addr]) -> Command {
    nft(add_script(migration, addresses))
}

/// The command that removes the rules of `migration`; no error when there are none.
pub fn remove(migration: &str) -> Command {
    nft(remove_script(migration))
}

/// The command that lets packets of the address pass again, while ARP stays silent: neighbours are
/// told of the address only once it is announced. Packets that wait in a queue are dropped: that is for
/// [`super::Hold::open`].
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
        .filter_map(|line| line.split_whitespace().last()?.strip_prefix(PREFIX))
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
