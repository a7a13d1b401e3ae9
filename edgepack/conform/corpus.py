"""The texts on which two tokenizers must agree: many scripts, code, numbers, white space, emoji, marks, controls.

Short texts, each made to hit one decision of a tokenizer; what a long text adds is mostly repetition. Knows nothing of
tokenizers but the names of their special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PROSE = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 5 o'clock; we're late, they've gone, I'll stay, he'd know, I'm here, don't!",
    "IT'S WE'RE THEY'VE I'LL HE'D I'M DON'T 'Tis rock'n'roll O'Neill's 'S 'LL 'Re 'vE",
    "it’s we’re they’ve — “quoted” ‘single’ … – ‐ ‑ ― «guillemets» ‹x›",
    "Él está aquí: ¿cómo estás? ¡Muy bien! Ñandú, pingüino, coração, façade, Ærøskøbing, Œuvre.",
    "Straße GROẞ ſchön İstanbul ılık DŽ dž ﬁ ﬂ Łódź Ångström naïve Zoë ÉTÉ été aÉ Éa XMLHttpÉtat camelCaseÀB",
    "Xin chào thế giới, Tiếng Việt có dấu: ằẵặ ỗ ữ.",
    "Ελληνικά: Η γρήγορη αλεπού. Ἀρχαῖα ὦ ᾳ. Привет, мир! Ёлка Їжак Ђак ҐӀ Ѭ ҂",
    "Հայերեն ԲԱՐԵՎ և ქართული ᲥᲐᲠᲗᲣᲚᲘ ⴀⴁ አማርኛ ሰላም። ᏣᎳᎩ ꮳꮃꭹ ᐃᓄᒃᑎᑐᑦ ᚠᚢᚦ ᠮᠣᠩᠭᠣᠯ",
    "שלום עולם, עִבְרִית עם ניקוד. مرحبا بالعالم، العَرَبِيَّة ١٢٣٤٥ ۱۲۳ لا إله ﷺ ‏RTL‎",
    "हिन्दी में नमस्ते दुनिया। क्षत्रिय श्री १२३ বাংলা ভাষা ২৩ ਪੰਜਾਬੀ ગુજરાતી தமிழ் மொழி తెలుగు ಕನ್ನಡ മലയാളം සිංහල",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ๑๒๓ ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ བོད་ཡིག ꦗꦮ",
    "你好，世界！中文分词测试。繁體中文「引號」『雙引號』、頓號。𠀀𠜎𫝆 㐀 豈 ⼀ ３２１ ＡＢＣ　全角空格",
    "こんにちは世界。カタカナｶﾀｶﾅ ひらがなー・ヽヾゝ々〆 ㍿ 第１２回 한국어 문장입니다. 조합형 각 ㄱㄴㄷ ㆍ",
)

_NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 -2.5e-10 1,000,000.00 1_000 0xDEADBEEF 0b1010 1st 2nd 192.168.0.1 2026-11-20T15:04:05Z $1,234.56 50%",
    "x2 2x a1b2c3 1a1 ½ ¼ ² ³ ¹ ₂ Ⅷ ⅷ ① ⑳ ㊿ ६७८ ٦٧ 〇 一二三 𝟙𝟚 ௧",
)

_CODE = (
    'def f(x: int) -> str:\n    """Doc."""\n    if x >= 10 and not y:\n\treturn f"{x!r:>{width}}"  # comment\n\n\n',
    '#include <stdio.h>\r\nint main(void) {\r\n\tprintf("%d\\n", a[i++] << 2);\r\n\treturn 0;\r\n}\r\n',
    "SELECT * FROM t WHERE a<>b AND c!=d || e==f && g->h::i /* x */ // y -- z ;;; !!! ??? ... ,,, ::: === --- ___ ***",
    '{"key": ["a", 1, null, true], "nested": {"x": -1.0}}\n<a href="https://example.org/?q=1&r=%20#f">x</a> &amp; \\n',
    "camelCaseWord PascalCaseWord snake_case_word SCREAMING_CASE kebab-case HTTPServer2XX iPhone15Pro aB Ab AB ab",
    "/usr/local/bin:$HOME ~/.config C:\\Users\\x `tick` 'q' \"dq\" (p) [b] {c} <t> @user #tag ^caret |pipe| a/b/c/\n/d",
)

_SPACE = (
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d     e                 f",
    " a b ",
    "\n",
    "\n\n",
    "\r",
    "\r\n",
    "a\rb",
    "a\r\nb\r\n\r\nc",
    "a\n b\n  c\n   \n\n\nd\n ",
    "\t",
    "\t\ta\t b \t c\t",
    "  \n  \n",
    " \t\n\r \x0b\x0c x",
    "a\u00a0b\u2003c\u2009d\u3000e\u202ff\u2028g\u2029h\u0085i\u1680j",
    "a\u200bb\u200cc\u200dd\ufeffe\u2060f\u00adg",
    "." * 40 + "=" * 33 + "-" * 17 + " " * 65 + "x" + "\n" * 9 + "\t" * 9,
)

_SYMBOLS = (
    "😀😃 👍🏽 👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🏴‍☠️ 🇩🇪🇫🇷🇯🇵 ❤️ ☺︎ 1️⃣ #️⃣ 🫠🪿 x😀y 😀 😀",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ aᵢ ≤ √2 ≈ 1.41 ± 0.01 × 10⁻³ ÷ ∞ α→β ⇒ γ ∂f/∂x ∮ ⊕ ¬ ∧ ∨ ℵ ℏ Å µ μ Ω Ω",
    "€£¥₹₿¢ ©®™ §¶†‡ • ‣ ◦ ■□▲△★☆ ♠♥♦♣ ♩♪ ─│┌┐└┘ ▁▂▃▄▅▆▇█ ░▒▓ ⠿ ☃ ✓✗ ➜ ⟨x⟩ ｟y｠ ﹏ ︰",
    "e\u0301 a\u0308 o\u0323\u0302 n\u0303 A\u030a \u0301alone q\u0307\u0323 q\u0323\u0307 \u1100\u1161\u11a8",
    "\u0915\u093c \u0928\u093c \u09a1\u09bc \u0ba8\u0bbe \u0d15\u0d46\u0d3e",
    "\u212b \u2126 \ufb01 \uff21 \u00e9\u0301 \u0344 \u0958 \u2f800 \U0002f800 \uf900 \u1e9b\u0323",
    "Z̷̢͝a̸l̵g̶o̷ x\u20dd y\u0336 ก\u0e49\u0e33 \u0627\u0653 \u05d1\u05bc",
)

_CONTROLS = (
    "a\x00b",
    "\x01\x02\x03\x07\x08\x0e\x1b[31m red \x1b[0m\x7f\x80\x9f",
    "\ufffd \ufffe \uffff \ue000 \U0010ffff \U000e0041 \u061c\u200e\u200f\u202a\u202e\u2066\u2069",
    "<0x0A> <s> </s> <unk> <pad> [UNK] [CLS] [MASK] [PAD1] <|x|> <|endoftext| > ▁ ▁▁ a▁b Ġ Ċ ĠĠ Ã© ##ing",
)

_LONG = (
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "a" * 300,
    "ab" * 120 + "1" * 150 + "é" * 130,
    "你" * 120 + "ไ" * 60,
    "https://example.org/" + "path/" * 30 + "?" + "&".join(f"k{i}=v{i}" for i in range(30)),
)

TEXTS: tuple[str, ...] = (*_PROSE, *_NUMBERS, *_CODE, *_SPACE, *_SYMBOLS, *_CONTROLS, *_LONG)

_AROUND = ("{}", "before{}after", "a {} b", "{}\nx", "{} {}", " {}", "x{}{}é")
_MOST = 24  # special tokens tried; some vocabularies have a thousand reserved ones, which are all alike


def texts(special: Iterable[str]) -> Iterator[str]:
    """Every text, then texts with special tokens inside them.

    Args:
        special: Texts of the added tokens; the first and the last dozen are used.
    """
    yield from TEXTS
    names = list(dict.fromkeys(name for name in special if name))
    chosen = names if len(names) <= _MOST else names[: _MOST // 2] + names[-_MOST // 2 :]
    for name in chosen:
        for around in _AROUND:
            yield around.replace("{}", name)
    if chosen:
        yield "".join(f"{name}word " for name in chosen)
