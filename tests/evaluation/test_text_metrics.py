"""Metrics of predicted texts compared with values computed by hand from their papers, in any script."""

import math
import sys
import unicodedata
from typing import get_args

import pytest
import regex
import sacrebleu

from t5like.config import loader
from t5like.config.schema import Metric
from t5like.errors import ConfigError
from t5like.evaluation.segmentation import num_words, words
from t5like.evaluation.text_metrics import (
    METRICS,
    copy_baseline,
    lead_baseline,
    majority_baseline,
    normalize,
    rules_for,
    score,
)


def one(name, prediction, *references):
    return score([name], [prediction], [references])[name]


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Broncos", "broncos"),
        ("a  CAT,\tan owl & the  dog.", "cat owl dog"),
        ("theater another", "theater another"),  # articles only as words
        ("The U.S.A.'s  end", "usas end"),
        ("«Élan» — Straße", "«élan» — straße"),  # only ASCII punctuation is removed
        ("state-of-the-art", "stateoftheart"),  # punctuation is removed first, so that there is no article
        ("the", "the"),  # unlike in SQuAD: differs from an empty answer
        ("?", "?"),
    ],
)
def test_normalization_of_english_is_that_of_squad(text, normal):
    assert normalize(text, english=True) == normal


@pytest.mark.parametrize(
    "text, normal",
    [
        ("«Ça va?» — A l’école", "ça va a lécole"),  # punctuation of any script; no articles
        ("STRASSE Straße", "strasse strasse"),
        ("e\u0301te\u0301", "été"),  # canonically equivalent
        ("10² ① ﬁ", "10² ① ﬁ".casefold()),  # compatibility equivalents differ
        ("می\u200cخواهم", "میخواهم"),  # joiners are ignored
        ("ሰላም፡ነው።", "ሰላም ነው"),
        ("。", "。"),
    ],
)
def test_normalization_of_other_languages_removes_only_punctuation_and_case(text, normal):
    assert normalize(text, english=False) == normal


def test_the_best_reference_counts():
    assert one("exact_match", "the Denver Broncos!", "Carolina Panthers", "Denver Broncos") == 100
    # 2 of 2 predicted words in 3 of the first reference: 2 * 2 / (2 + 3); 1 in 1 of the second: 2 * 1 / (2 + 1).
    assert one("f1", "the Denver Broncos", "Denver Broncos team", "Broncos") == pytest.approx(80)


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    assert one("f1", "b b b", "b b c") == pytest.approx(100 * 2 * 2 / 6)


@pytest.mark.parametrize(
    "prediction, reference, value",
    [("", "", 100), ("", "A", 0), ("the", "A", 0), ("A", "A", 100), ("?", "!", 0), ("", "。", 0), ("", "x", 0)],
)
def test_texts_without_words_score_only_if_equal(prediction, reference, value):
    for language in ("auto", "en", "ru", "zh"):
        found = score(["f1", "exact_match"], [prediction], [[reference]], language)
        assert found == {"f1": value, "exact_match": value}


def test_accuracy_depends_on_case_and_punctuation_but_not_on_outer_spaces():
    assert one("accuracy", " yes\n", "yes") == 100
    assert one("accuracy", "Yes", "yes") == one("accuracy", "yes.", "yes") == 0


def test_scores_are_means_over_examples_in_any_order():
    predictions, references = ["a b", "x", "q r s t u", ""], [["b"], ["y"], ["q r s t v"], ["z"]]
    names = ["exact_match", "f1", "accuracy"]
    values = score(names, predictions, references)
    assert values == pytest.approx({"exact_match": 25, "f1": (100 + 0 + 80 + 0) / 4, "accuracy": 0})
    assert score(names, predictions[::-1], references[::-1]) == pytest.approx(values)


def test_bleu_is_the_geometric_mean_of_precisions_times_the_brevity_penalty():
    # 5 of 6 words, 4 of 5, 3 of 4 and 2 of 3 runs are right, and nothing is short.
    assert one("bleu", "a b c d e x", "a b c d e f") == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # All are right; 5 words of 7.
    assert one("bleu", "a b c d e", "a b c d e f g") == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert one("bleu", "", "a b c d") == 0
    # Counts are summed over the corpus and then divided: not a mean over texts.
    both = score(["bleu"], ["a b c d e f", "q r s t"], [["a b c d e f"], ["q r x t"]])["bleu"]
    assert both == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 3 / 4) ** 0.25)


def test_bleu_accepts_a_different_number_of_references_per_example():
    values = score(["bleu"], ["a b c d", "e f g h"], [["x y z w", "a b c d"], ["e f g h"]])
    assert values["bleu"] == pytest.approx(100)


def test_chrf_of_equal_texts_is_100_and_of_disjoint_ones_0():
    assert one("chrf", "für Äpfel", "für Äpfel") == pytest.approx(100)
    assert one("chrf", "abc", "xyz") == 0


def test_rouge_is_the_f_measure_of_stemmed_words():
    # police kill the gunman / police killed the gunman (Lin 2004, section 3): with a stemmer, the same.
    assert one("rouge1", "police kill the gunman", "police killed the gunman") == pytest.approx(100)
    # "the gunman kill police": 1 of 3 pairs is right, and the longest common subsequence has 2 of 4 words.
    assert one("rouge2", "the gunman kill police", "police killed the gunman") == pytest.approx(100 / 3)
    assert one("rougeL", "the gunman kill police", "police killed the gunman") == pytest.approx(50)
    # 2 of 2 words, 2 of 4: F = 2 * 1 * 0.5 / 1.5.
    assert one("rouge1", "police kill", "police killed the gunman") == pytest.approx(200 / 3)
    assert one("rougeL", "", "police") == one("rouge1", "police", "") == 0


def test_rouge_l_takes_the_whole_text_as_one_sequence():
    assert one("rougeL", "c d\na b", "a b\nc d") == pytest.approx(50)  # rougeLsum would give 100


# Article 1 of the Universal Declaration of Human Rights, its beginning; sacrebleu's tokenizer that `auto` selects.
LANGUAGES = {
    "en": ("All human beings are born free and equal in dignity and rights.", "13a"),
    "de": ("Alle Menschen sind frei und gleich an Würde und Rechten geboren.", "13a"),
    "fr": ("Tous les êtres humains naissent libres et égaux en dignité et en droits.", "13a"),
    "es": ("Todos los seres humanos nacen libres e iguales en dignidad y derechos, según él.", "13a"),
    "pt": ("Todos os seres humanos nascem livres e iguais em dignidade e em direitos. São dotados de razão.", "13a"),
    "it": ("Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.", "13a"),
    "nl": ("Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.", "13a"),
    "id": ("Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.", "13a"),
    "sw": ("Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.", "13a"),
    "pl": ("Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.", "13a"),
    "cs": ("Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.", "13a"),
    "hu": ("Minden emberi lény szabadon születik és egyenlő méltósága és joga van.", "13a"),
    "fi": ("Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.", "13a"),
    "tr": ("Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İnsan!", "13a"),
    "vi": ("Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.", "13a"),
    "yo": ("Gbogbo ènìyàn ni a bí ní òmìnira; iyì àti ẹ̀tọ́ kọ̀ọ̀kan sì dọ́gba.", "13a"),
    "ru": ("Все люди рождаются свободными и равными в своём достоинстве и правах.", "13a"),
    "uk": ("Всі люди народжуються вільними і рівними у своїй гідності та правах.", "13a"),
    "bg": ("Всички хора се раждат свободни и равни по достойнство и права.", "13a"),
    "kk": ("Барлық адамдар тумысынан азат және қадір-қасиеті мен құқықтары тең.", "13a"),
    "el": ("Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.", "13a"),
    "hy": ("Բոլոր մարդիկ ծնվում են ազատ ու հավասար՝ իրենց արժանապատվությամբ և իրավունքներով։", "13a"),
    "ka": ("ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.", "13a"),
    "he": ("כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.", "13a"),
    "ar": ("يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، وقد وهبوا عقلًا.", "13a"),
    "fa": ("تمام افراد بشر آزاد به دنیا می\u200cآیند و از لحاظ حیثیت و حقوق با هم برابرند.", "13a"),
    "ur": ("تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔", "13a"),
    "dv": ("ހުރިހާ އިންސާނުން ވެސް އުފަންވަނީ މިނިވަންކަމުގައެވެ.", "13a"),
    "am": ("የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።", "13a"),
    "hi": ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।", "13a"),
    "ne": ("सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् ती सबैको समान अधिकार र महत्व छ।", "13a"),
    "bn": ("সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।", "13a"),
    "pa": ("ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ।", "13a"),
    "gu": ("પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે.", "13a"),
    "ta": ("மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் சமமானவர்கள்.", "13a"),
    "te": ("ప్రతిపత్తి స్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును అగుదురు.", "13a"),
    "kn": ("ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ ಹಾಗೂ ಘನತೆ ಮತ್ತು ಹಕ್ಕುಗಳಲ್ಲಿ ಸಮಾನರಾಗಿದ್ದಾರೆ.", "13a"),
    "ml": ("മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും അന്തസ്സോടും സ്വാതന്ത്ര്യത്തോടുംകൂടി ജനിച്ചവരാണ് എന്ന്.", "13a"),
    "si": ("සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත. ගරුත්වයෙන් හා අයිතිවාසිකම්වලින් සමාන වෙති.", "13a"),
    "ko": ("모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.", "13a"),
    "zh": ("人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。", "zh"),
    "ja": ("すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。", "char"),
    "th": ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ", "char"),
    "lo": ("ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ ສິດທິ ເສລີພາບ ແລະ ຄວາມສະເໝີພາບເທົ່າທຽມກັນ", "char"),
    "km": ("មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។", "char"),
    "my": ("လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။", "char"),
    "bo": ("འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ།", "char"),
}
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"


class ByRegex:
    """Words by the package regex, which has its own data of scripts and categories: an independent reference."""

    def tokenize(self, text):
        text = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFC", text).casefold())
        return regex.findall(
            rf"[{UNSPACED}--\p{{M}}--\p{{P}}]\p{{M}}*|[\p{{L}}\p{{N}}--[{UNSPACED}]][\p{{L}}\p{{N}}\p{{M}}--[{UNSPACED}]--\p{{Han}}]*",
            text,
            regex.V1,
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_text_scores_100_in_every_script_and_another_text_less(language):
    text, tokenizer = LANGUAGES[language]
    names = list(METRICS)
    for asked in ("auto", *({language} - {"ja", "ko"})):
        assert score(names, [text], [[text]], asked) == pytest.approx(dict.fromkeys(names, 100)), asked
    english = rules_for([[text]]).english
    assert english == (language in ("en", "nl", "id", "sw")) and rules_for([[text]]).tokenizer == tokenizer
    half = text[: len(text) // 2]
    found = score(names, [half], [[text]])
    assert found["exact_match"] == found["accuracy"] == 0 and all(value < 100 for value in found.values())
    assert all(found[name] > 30 for name in ("f1", "rouge1", "rougeL", "chrf"))
    from rouge_score.rouge_scorer import RougeScorer  # here: it imports scikit-learn, for seconds

    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True, tokenizer=None if english else ByRegex())
    for name, value in theirs.score(text, half).items():
        assert found[name] == pytest.approx(100 * value.fmeasure), name
    assert found["bleu"] == sacrebleu.corpus_bleu([half], [[text]], tokenize=tokenizer).score
    assert found["chrf"] == sacrebleu.corpus_chrf([half], [[text]]).score


def test_words_keep_their_marks_and_letters_without_spaces_stand_alone():
    assert words("हिन्दी में, किया") == ["हिन्दी", "में", "किया"]
    assert words("ที่นี่ 25 บาท") == ["ที่", "นี่", "25", "บ", "า", "ท"]
    assert words("東京2020へGo!") == ["東", "京", "2020", "へ", "go"]
    assert words("L'État a_b €5 👍🏽") == ["l", "état", "a", "b", "€", "5", "👍🏽"]


def test_a_language_code_overrides_detection_and_the_rule_is_described(monkeypatch):
    indonesian, rule = "buku a", lambda name, *asked: rules_for([[LANGUAGES["ja"][0]]], *asked).describe(name)
    assert one("exact_match", "buku", indonesian) == 100  # as in English
    assert score(["exact_match"], ["buku"], [[indonesian]], "id")["exact_match"] == 0
    assert "SQuAD" in rule("f1", "en") and "MLQA" in rule("f1") and "Porter" not in rule("rouge1")
    assert "tok:char" in rule("bleu") and "tok:zh" in rule("bleu", "zh") and "tok:13a" in rule("bleu", "ru")
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(
        ConfigError, match=r"needs MeCab for ja-mecab; pip install 'sacrebleu\[ja\]', or use evaluate.la"
    ):
        score(["bleu"], ["a"], [["a"]], "ja")
    with pytest.raises(ConfigError, match="evaluate.language='jp' must be auto or an ISO 639-1 code"):
        loader.resolve({"evaluate": {"language": "jp"}})


def test_a_majority_does_not_depend_on_order():
    assert majority_baseline(["b", "a", "b", "a", "c"]) == majority_baseline(["a", "c", "a", "b", "b"]) == "a"


def test_baselines_depend_only_on_the_input():
    assert lead_baseline(["one  two\nthree four", ""], 3) == ["one two three", ""]
    assert lead_baseline(["東京は、日本の 首都。"], 5) == ["東京は、日本"] and num_words("東京は、日本の 首都。") == 8
    assert copy_baseline(("x y",)) == ["x y"]


def test_an_unknown_metric_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="evaluate.metrics='rogue1' must be one of exact_match, .* rougeL"):
        score(["rogue1"], ["x"], [["x"]])
    for name in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"):
        with pytest.raises(ConfigError, match=f"evaluate.metrics='{name}' needs the package .*; pip install 't5like"):
            score([name], ["x"], [["x"]])


def test_the_schema_lists_every_metric_and_refuses_objectives_without_answers():
    assert get_args(Metric) == tuple(METRICS)
    supervised = {"data": {"objective": "supervised"}}
    config = loader.resolve({**supervised, "evaluate": {"metrics": list(METRICS), "answer_choices": ["yes", "no"]}})
    assert config.evaluate.metrics == tuple(METRICS)
    with pytest.raises(ConfigError, match="evaluate.metrics='rouge' must be one of .*; did you mean 'rouge"):
        loader.resolve({**supervised, "evaluate": {"metrics": ["rouge"]}})
    with pytest.raises(ConfigError, match="evaluate.metrics=.* need data.objective=supervised"):
        loader.resolve({"evaluate": {"metrics": ["f1"]}})
    for choices in (["yes"], ["yes", "yes"]):
        with pytest.raises(ConfigError, match="evaluate.answer_choices=.* at least two different texts, or empty"):
            loader.resolve({**supervised, "evaluate": {"answer_choices": choices}})
    with pytest.raises(ConfigError, match="evaluate.max_new_tokens=-1 must be at least 0"):
        loader.resolve({"evaluate": {"max_new_tokens": -1}})


@pytest.mark.parametrize("predictions, references", [([], []), (["x"], []), (["x"], [[]]), (["x"], ["x"])])
def test_predictions_and_references_that_do_not_match_are_refused(predictions, references):
    with pytest.raises(ValueError, match="references"):
        score(list(METRICS)[:1], predictions, references)
