//! What tasks do to their memory while it is coming in: read, followed, remembered.

use std::os::fd::RawFd;

use super::super::points::{self, Point};
use super::super::segments::Segment;
use super::super::shared::{self, Field, LOST, Shared, Word};
use super::super::uffd::{self, Event, FORK};
use super::Worker;
use super::contexts::{Context, apply, pages_of};
use super::log::EventLog;
use crate::pages::store::bits;
use crate::pages::store::{CHUNK, Set};

impl Worker<'_> {
    /// Reads what the task behind a context has done and wants. Changes of its memory are followed at
    /// once, faults are queued. Returns how many messages there were.
    pub(super) fn read_events(&mut self, at: usize) -> u64 {
        let mut count = 0;
        loop {
            let Some(context) = &mut self.contexts[at] else { return count };
            if !context.log.has_room() {
                make_room(self.shared, context, &self.spaces[context.space].chunks);
            }
            let records = match context.log.read(self.shared, context.fd) {
                Ok(records) => records,
                Err(e) => {
                    // Too many open files, most likely. The messages stay with the kernel.
                    self.shared.add(Word::Errors, 1);
                    if self.fill.may_complain() {
                        ::log::error!("cannot read page faults: {e}");
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    return count;
                }
            };
            let n = records.len() as u64;
            count += n;
            hit_read(self.shared, &records);
            let mut keep = false;
            for (number, record) in (0..).zip(&records) {
                match Event::parse(*record) {
                    Some(Event::Fault(addr)) => self.faults.push_back((at, addr)),
                    Some(Event::Fork(fd)) => {
                        keep = true;
                        self.fork(at, number, fd);
                    }
                    Some(event) => keep |= self.follow(at, event),
                    None => {}
                }
            }
            let Some(context) = &mut self.contexts[at] else { return count };
            if keep && !context.lost {
                context.log.keep(n);
            } else {
                context.log.discard(self.shared, n);
            }
            if n < shared::BATCH {
                return count;
            }
        }
    }

    /// A task has forked: record `number` of the batch says so.
    fn fork(&mut self, at: usize, number: u64, fd: RawFd) {
        self.shared.add(Word::Forks, 1);
        let Some(parent) = &self.contexts[at] else { return };
        let position = parent.log.position(number);
        let Some(slot) = self.adopt(parent.slot, position, fd, &parent.segments) else { return };
        let (log, _) = EventLog::open(self.shared, slot);
        // What the parent has got is there in the child too.
        let mut pending = parent.pending.clone();
        for (pending, (_, chunk)) in pending.iter_mut().zip(&self.spaces[parent.space].chunks) {
            let wiped = self.arena.bits(*chunk, Set::Wiped);
            pending.iter_mut().zip(wiped).for_each(|(pending, wiped)| *pending &= !wiped);
        }
        let child = Context {
            slot,
            fd,
            space: parent.space,
            segments: parent.segments.clone(),
            pending,
            left: 0,
            log,
            lost: self.shared.read(slot, Field::State) == LOST,
            reach: 64,
        };
        self.add(child);
    }

    /// A task has changed its memory. Returns whether that has to be remembered.
    fn follow(&mut self, at: usize, event: Event) -> bool {
        let Some(context) = &mut self.contexts[at] else { return false };
        let (gone, keep) = apply(&mut context.segments, event);
        for Segment { len, orig, .. } in gone {
            self.forget(at, orig, len);
        }
        keep
    }
}

/// Rewrites a full log as what it led to; without room for that, it is given up.
fn make_room(shared: &Shared, context: &mut Context, chunks: &[(u64, u32)]) {
    if !context.lost {
        trim(context, chunks);
        match context.log.rewrite(shared, &context.segments) {
            Ok(true) => return,
            Ok(false) => ::log::error!("the memory of a task is too scattered to be remembered"),
            Err(e) => ::log::error!("event log: {e}"),
        }
        shared.add(Word::Errors, 1);
        shared.write(context.slot, Field::State, LOST);
        context.lost = true;
    }
    if let Err(e) = context.log.give_up(shared) {
        ::log::error!("event log: {e}");
    }
}

/// Forgets segments in which no page is needed any more.
fn trim(context: &mut Context, chunks: &[(u64, u32)]) {
    let pending = &context.pending;
    context.segments.retain(|Segment { len, orig, .. }| {
        let from = chunks.partition_point(|(index, _)| (index + 1) * CHUNK <= orig);
        let here = chunks.iter().zip(pending).skip(from);
        here.take_while(|((index, _), _)| index * CHUNK < orig + len).any(
            |((index, _), pending)| {
                let pages = pages_of(index * CHUNK, orig, len);
                bits::next(pending, pages.start).is_some_and(|page| page < pages.end)
            },
        )
    });
}

/// Fault points by what was read.
fn hit_read(shared: &Shared, records: &[[u64; 4]]) {
    for record in records {
        let point = match record[0] as u8 {
            FORK => Point::ReadFork,
            uffd::REMAP => Point::ReadRemap,
            uffd::REMOVE => Point::ReadRemove,
            uffd::UNMAP => Point::ReadUnmap,
            _ => Point::ReadFault,
        };
        points::hit(shared, point);
    }
}
