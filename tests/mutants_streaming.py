"""Mutants of the live stream and the server: see tests/mutants.py."""

STREAMING: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("student/stream.py", "student self_forcing"): [
        ("@torch.no_grad()\ndef remember_chunk(", "def remember_chunk(", "what is remembered carries gradient"),
        ("and (exit_step is None or index == exit_step)", "", "every step carries gradient"),
        ("history.spoiled(x0, generator), cond", "CLEAN.spoiled(x0, generator), cond", "history never noised"),
        (
            "return x0, remember_chunk(refiner, x0,",
            "return x0, remember_chunk(refiner, draft,",
            "refiner remembers the draft",
        ),
        (
            "remember_chunk(backbone, draft, told, cache, config.history, generator)",
            "remember_chunk(backbone, draft, told, cache, 0.0, generator)",
            "backbone streams under clean history",
        ),
    ],
    ("student/hearing.py", "session"): [
        ("% len(ENDS) + len(ENDS)  #", "% len(ENDS)  #", "features of the past are taken for new ones"),
        (
            "features[:, -AUDIO_PER_LATENT * PAST :].clone()",
            "features[:, -AUDIO_PER_LATENT * PAST :]",
            "a view is kept",
        ),
    ],
    ("student/session.py", "session"): [
        ('keyed_generator(self.seed, index, "draft")', 'keyed_generator(self.seed, 0, "draft")', "noise of chunk 0"),
        ("        self._drafts = {}\n", "", "a chunk made ahead is shown after the interruption"),
        ("max(self._drafts, default=self.index - 1) + 1", "self.index", "a text for a chunk that is made already"),
        ("= draft.cache, final_cache, draft.heard", "= draft.cache, final_cache, self.heard", "the session stays deaf"),
        ("        self._drafts.pop(self.index, None)\n", "", "drafts pile up"),
        ("self.texts = [(self.index, self.texts[-1][1])]", "pass", "an interruption keeps the old text"),
    ],
    ("student/session_file.py", "session"): [
        ('facts["frames"])', "0)", "audio is resumed at another phase"),
        ('for first, text in facts["texts"]]', 'for first, text in facts["texts"][:1]]', "a text to come is lost"),
    ],
    ("student/fast.py", "session"): [
        ("known[1] is not cache", "False", "the context of another chunk"),
        ("return float(t[0]), None", "return 0.0, None", "the time of another step"),
    ],
    ("student/fast.py", "promise"): [
        ("Part(promise.x, _single(promise.t, None), sight)", "Part(promise.x, (1.0, None), sight)", "history as noise"),
        ("Promise(self, x.clone()", "Promise(self, x", "a chunk that was changed is remembered"),
        ("if not _same(context", "if False and not _same(context", "the step saw what is not in the cache"),
        (
            "table[-1][2:] = known[1][1][-1][2:]",
            "table[-1][2:] = known[0][1][-1][2:]",
            "the last layer at another time",
        ),
    ],
    ("student/sight.py", "session"): [
        ("known[0] is not cond.text or known[1] is not cond.text_mask", "False", "the text before"),
        ("bool(kv.mask.all())", "True", "absent references are seen"),
        ("not torch.equal(known[0], places)", "False", "keys at the places of an earlier window"),
        (
            "None if owed is None else turn[owed]",
            "None if owed is None else turn[-gap.shape[1] :]",
            "the chunk before at the place of the next",
        ),
        ("math.sqrt(width * norm.eps)", "math.sqrt(norm.eps)", "the norm's eps of one channel"),
    ],
    ("student/promise.py", "promise"): [
        ("self.before.push(self.network.write(self))", "self.before", "a promised chunk is forgotten"),
    ],
    ("student/stream.py", "promise"): [
        (
            "backbone.stream, anew(cache)",
            "backbone.stream, cache",
            "a draft thrown away keeps the session's promise",
        ),
    ],
    ("student/session_file.py", "promise"): [
        ('if shape["promised"] else cache', "if False else cache", "the chunk promised at saving is lost"),
    ],
    ("student/online.py", "online"): [
        ("if found != FORMAT:", "if found is None:", "a folder of another format is read"),
    ],
    ("evaluation/sound.py", "streaming"): [
        (".mean(0)", "[0]", "the second channel is not heard"),
    ],
    ("evaluation/film.py", "streaming"): [
        ("temporary.unlink(missing_ok=True)", "pass", "half a film is left"),
        ("SAMPLE_RATE, self.num_samples", "SAMPLE_RATE, 0", "all sound at the start"),
    ],
    ("evaluation/latency.py", "streaming"): [
        ("given[0].shape[:-1].numel()", "1", "tokens that pass are not counted"),
    ],
    ("student/live/scheduler.py", "serve serve_model"): [
        ("self._ring.append(job)", "self._ring.appendleft(job)", "one session goes on until its sound is used up"),
        ("job.inbox.popleft()", "job.inbox.pop()", "what a session is told comes in the wrong order"),
    ],
    ("student/live/connection.py", "serve serve_limits"): [
        ("round(at * SAMPLE_RATE) + one.dropped", "round(at * SAMPLE_RATE)", "interrupted sound is not counted"),
        ("self.drawn - self.shown >= self.limits.frames_waiting", "False", "a slow client's pictures pile up"),
        ("self.studio.leave(len(self.running))", "self.studio.leave(0)", "places are never given back"),
        ("if waiting > self.limits.backlog_seconds", "if False", "sound piles up"),
        ("        self.done += dropped\n", "", "interrupted sound counts as waiting"),
        ("if ahead > self.limits.ahead_seconds", "if False", "sound faster than real time"),
    ],
    ("student/live/guard.py", "serve serve_limits"): [
        ("if name in self.names", "if name.startswith(tuple(self.names))", "a name that begins like ours"),
        ("urlsplit(origins[0]).netloc.lower() != hosts[0].lower()", "False", "pages from anywhere may connect"),
    ],
    ("student/live/wire.py", "serve serve_limits"): [
        ("(samples, silence) if channel == SPEAK", "(samples, silence) if channel == LISTEN", "channels swapped"),
    ],
    ("student/live/studio.py", "serve serve_model"): [
        ("seed=told.seed", "seed=0", "every session has the same noise"),
        ("self.references[told.character]", "next(iter(self.references.values()))", "all get the first character"),
    ],
    ("student/live/meters.py", "serve_model"): [
        ("return 1.0 - float(", "return float(", "likeness instead of distance"),
        ("maxlen=RECENT", "maxlen=None", "a real-time factor of the whole past"),
    ],
    ("student/serve.py", "serve_limits serving"): [
        ("self.loop.call_later(CUT_SECONDS, self.transport.abort)", "pass", "a client that never reads is never cut"),
        ("listener.bind(address)", 'listener.bind(("", address[1]))', "bound to every address"),
    ],
}
