//! From one host to the other by ferry's own commands, as a user would: `ferry checkpoint --exit`,
//! `ferry push`, `ferry restore`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::paths;
use ferry_tests::Host;
use ferry_tests::containers::edit_spec;
use ferry_tests::ctr::wait_for_status;
use ferry_tests::exec::Job;
use ferry_tests::scene::RUNTIME;

use crate::bed::{Bed, PLACE};
use crate::container::survived;
use crate::item::Item;
use crate::spec;

/// How long something may take that happens by itself.
const SOON: Duration = Duration::from_secs(40);

/// A container in containerd, with an item in it.
struct Ferried<'a> {
    host: &'a Host,
    item: Item,
    id: String,
    /// Its first process, as the host sees it.
    pid: u32,
    /// Who sits at its terminal.
    client: Option<Job>,
}

/// Goes there, and back if it has more than one way to go.
pub(crate) fn by_commands(bed: &'static Bed, item: Item) -> Result<()> {
    let id = format!("{}-ferried", item.name);
    let mut container = Ferried::start(bed.a.host, item, &id).context("start it")?;
    for hop in 0..item.hops {
        container = container.cross(if hop % 2 == 0 { bed.b.host } else { bed.a.host })?;
        container.look()?;
    }
    container.end()
}

impl<'a> Ferried<'a> {
    fn start(host: &'a Host, item: Item, id: &str) -> Result<Self> {
        let terminal = if item.terminal { "--tty" } else { "" };
        host.run(&format!(
            "mkdir -p {PLACE}/{id}/bind; ctr container create {terminal} --runtime {RUNTIME} \
             --env 'SURVIVE=as it was' \
             --mount type=tmpfs,src=tmpfs,dst=/scratch,options=nosuid:nodev:size=64m:mode=1777 \
             --mount type=bind,src={PLACE}/{id}/bind,dst=/bind,options=rbind:rw \
             --mount type=bind,src={PLACE}/lower/ferry-survive,dst=/ferry-survive,options=rbind:ro \
             docker.io/library/busybox:latest {id} \
             sh -c 'mkdir -p -m 777 /ctl /var; exec /ferry-survive {}'",
            item.name
        ))?;
        if item.limits {
            edit_spec(host, id, spec::limit)?;
        }
        let client = match item.terminal {
            // ctr gives the container's terminal the size of its own, at any time: here that which
            // the item sets.
            true => Some(host.spawn_at_terminal(&format!("ctr task start {id}"), (41, 133))?),
            false => host.run(&format!("ctr task start --detach --null-io {id}")).map(|_| None)?,
        };
        wait_for_status(host, id, "RUNNING")?;
        let container = Self { client, ..Self::running(host, item, id)? };
        let ready = container.hear("ready")?;
        let mut lines = ready.lines();
        ensure!(lines.next() == Some("nothing ok"), "before any checkpoint: {ready}");
        let noticed = lines.next().is_some_and(|line| line.starts_with("change wrong: "));
        ensure!(noticed, "a change goes unnoticed: {ready}");
        Ok(container)
    }

    fn running(host: &'a Host, item: Item, id: &str) -> Result<Self> {
        let pid = host.run(&format!("ctr task ls | awk '$1 == \"{id}\" {{print $2}}'"))?.stdout;
        let pid = pid.trim().parse().with_context(|| format!("{id} has no task"))?;
        Ok(Self { host, item, id: id.to_owned(), pid, client: None })
    }

    fn cross<'b>(mut self, to: &'b Host) -> Result<Ferried<'b>> {
        let (from, id) = (self.host, &self.id);
        from.run(&format!("ferry checkpoint {id} {id} --exit")).context("checkpoint")?;
        from.run(&format!("ferry push {id} --to ssh://root@{}", to.address())).context("push")?;
        // What is bound from the host is not part of it.
        to.run(&format!("rm -rf {PLACE}/{id}; mkdir {PLACE}/{id}"))?;
        let bound = |host: &Host| host.root().join(format!("{}/{id}/bind", &PLACE[1..]));
        let copied = Command::new("cp").arg("-aT").args([bound(from), bound(to)]).status()?;
        ensure!(copied.success(), "what is bound was not copied");
        to.run(&format!("ferry restore {id} --allow mounts")).context("restore")?;
        for host in [from, to] {
            host.run(&format!("ferry discard {id}")).context("discard")?;
        }
        // A client at its terminal may have removed the task.
        drop(self.client.take());
        from.run(&format!("ctr task rm {id} 2>/dev/null; ctr container rm {id}"))
            .context("remove it")?;
        Ferried::running(to, self.item, id)
    }

    fn look(&self) -> Result<()> {
        if self.item.exec {
            let exec = "ctr task exec --exec-id now";
            self.host.run(&format!("{exec} {} /ferry-survive now /ctl/now", self.id))?;
        }
        let ask = self.word("ask");
        std::fs::write(&ask, "").with_context(|| format!("ask by {}", ask.display()))?;
        if self.item.terminal {
            self.end_of_terminal("stdin")?.write_all(b"typed\n").context("type")?;
            let seen = survived(&mut self.end_of_terminal("stdout")?);
            if let Err(err) = seen.context("read from the terminal") {
                // What it found says more.
                bail!("{err:#}; {:?}", self.hear("answer"));
            }
        }
        let answer = self.hear("answer")?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        let (host, id) = (self.host, &self.id);
        host.run(&format!("ctr task kill -s KILL {id}"))?;
        wait_for_status(host, id, "STOPPED")?;
        host.run(&format!("ctr task rm {id}; ctr container rm {id}")).map(drop)
    }

    /// What a client would open that attaches to the restored terminal.
    fn end_of_terminal(&self, name: &str) -> Result<File> {
        let path = paths::terminal("default", &self.id).join(name);
        let here = self.host.root().join(path.strip_prefix("/")?);
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(nix::libc::O_NONBLOCK);
        options.open(&here).with_context(|| format!("open {}", here.display()))
    }

    /// A file by which the item is spoken to, as this machine sees it.
    fn word(&self, name: &str) -> PathBuf {
        self.host.root().join(format!("proc/{}/root/ctl/{name}", self.pid))
    }

    fn hear(&self, name: &str) -> Result<String> {
        let (path, deadline) = (self.word(name), Instant::now() + SOON);
        loop {
            if let Ok(text) = std::fs::read_to_string(&path) {
                std::fs::remove_file(&path).context("take its answer away")?;
                return Ok(text);
            }
            if Instant::now() > deadline {
                let tasks = self.host.run("ctr task ls")?.stdout;
                bail!("{}: no {name}; {tasks}", self.id);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
